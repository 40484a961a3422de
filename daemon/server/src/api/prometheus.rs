//! Figures in Prometheus' text format, version 0.0.4. Where vLLM has a figure that means the same,
//! it has vLLM's name, so that dashboards made for it work; the others begin with `v4_`.

use std::fmt::Write as _;

use v4_supervisor::metrics::{Counter, Distribution, Histogram, ModelFigures, Now, Series};

use crate::ops::metrics::Snapshot;

/// The content type of the text.
pub const TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The label that says whose a figure is.
const MODEL: &str = "model_name";

/// One metric: what its lines begin with.
struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
}

/// A metric, and where its value is in what a model has now.
type Present = (Family, fn(&Now) -> f64);
/// A metric, and its counter.
type Counted = (Family, fn(&Series) -> &Counter);
/// A metric, and its histogram.
type Timed = (Family, fn(&Series) -> &Histogram);

/// Something that goes up and down.
const fn gauge(name: &'static str, help: &'static str) -> Family {
    Family { name, kind: "gauge", help }
}

/// Something that only grows.
const fn counter(name: &'static str, help: &'static str) -> Family {
    Family { name, kind: "counter", help }
}

/// How long something took, how often.
const fn histogram(name: &'static str, help: &'static str) -> Family {
    Family { name, kind: "histogram", help }
}

/// What a model has now, a line a model.
const NOW: [Present; 6] = [
    (gauge("vllm:num_requests_running", "Requests that a runner has."), |now| now.running as f64),
    (gauge("vllm:num_requests_waiting", "Requests that wait for a place or for a load."), |now| {
        now.waiting as f64
    }),
    (gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, from 0 to 1."), |now| {
        now.blocks_used as f64 / now.blocks_total.max(1) as f64
    }),
    (gauge("v4_kv_blocks_used", "KV blocks in use, by the last heartbeat of the runner."), |now| {
        now.blocks_used as f64
    }),
    (gauge("v4_kv_blocks", "KV blocks there are."), |now| now.blocks_total as f64),
    (
        gauge("v4_model_loaded_bytes", "Memory for weights, KV and scratch; 0 is not loaded."),
        |now| now.bytes as f64,
    ),
];

/// What is counted of a model, a line a model.
const COUNTED: [Counted; 13] = [
    (
        counter("vllm:prompt_tokens_total", "Tokens of the prompts of ended answers, with cached."),
        |series| &series.prompt_tokens,
    ),
    (counter("vllm:generation_tokens_total", "Tokens of ended answers."), |series| {
        &series.generation_tokens
    }),
    (
        counter("vllm:prefix_cache_queries_total", "Tokens looked up in the prefix cache."),
        |series| &series.prompt_tokens,
    ),
    (counter("vllm:prefix_cache_hits_total", "Of these, tokens that it had."), |series| {
        &series.cached_tokens
    }),
    (counter("vllm:spec_decode_num_draft_tokens_total", "Tokens that were guessed."), |series| {
        &series.drafted
    }),
    (
        counter("vllm:spec_decode_num_accepted_tokens_total", "Of these, tokens that were right."),
        |series| &series.accepted,
    ),
    (counter("v4_engine_steps_total", "Steps of the engine."), |series| &series.steps),
    (counter("v4_model_loads_total", "Loads that ended well."), |series| &series.loads),
    (
        counter("v4_model_load_failures_total", "Loads that a runner refused with a reason."),
        |series| &series.load_failures,
    ),
    (
        counter("v4_runner_deaths_total", "Runners that crashed, hung or broke the protocol."),
        |series| &series.deaths,
    ),
    (
        counter(
            "v4_answers_failed_total",
            "Requests of a model that ended with a fault, refused or begun.",
        ),
        |series| &series.failed,
    ),
    (counter("v4_kv_blocks_saved_total", "KV blocks given to the disk."), |series| {
        &series.blocks_saved
    }),
    (counter("v4_kv_blocks_restored_total", "KV blocks that came back from it."), |series| {
        &series.blocks_restored
    }),
];

/// How long things took, a histogram a model.
const TIMED: [Timed; 3] = [
    (
        histogram("vllm:time_to_first_token_seconds", "From a request to its first piece of text."),
        |series| &series.first_token,
    ),
    (
        histogram("vllm:inter_token_latency_seconds", "From one piece of an answer to the next."),
        |series| &series.inter_token,
    ),
    (histogram("v4_model_load_seconds", "From the order to load to a ready model."), |series| {
        &series.load_time
    }),
];

const FINISHED: Family =
    counter("vllm:request_success_total", "Answers by `finished_reason`: stop, length, abort.");
const UNLOADS: Family =
    counter("v4_model_unloads_total", "Runners told to leave by `reason`; `room` is a swap.");
const REQUESTS: Family =
    counter("v4_http_requests_total", "Requests by `method`, `route` and `status`.");
const BUDGET: Family = gauge("v4_memory_budget_bytes", "Memory that all models may take.");
const USED: Family = gauge("v4_memory_used_bytes", "Memory taken or promised to loads.");
const STORE: Family = gauge(
    "v4_store_bytes",
    "Disk by `kind`: models, orphans, deleted, partials, and kv of idle conversations.",
);
const PULLS: Family = gauge("v4_pulls_running", "Pulls that run or are paused.");
const PULLED: Family = counter("v4_pull_bytes_total", "Bytes that pulls took from their sources.");
const DROPPED: Family =
    counter("v4_otlp_spans_dropped_total", "Spans that the collector of `V4_OTLP` did not take.");
const BUILD: Family = gauge("v4_build_info", "Always 1; `version` is that of the daemon.");

/// All figures as text.
pub fn page(snapshot: &Snapshot) -> Vec<u8> {
    let mut page = Page::default();
    let models = &snapshot.figures.models;
    for (family, value) in &NOW {
        page.of_models(family, models, |model| value(&model.now));
    }
    for (family, value) in &COUNTED {
        page.of_models(family, models, |model| value(&model.series).get() as f64);
    }
    page.begin(&FINISHED);
    for ModelFigures { name, series, .. } in models {
        let ends = [("stop", &series.stopped), ("length", &series.cut), ("abort", &series.aborted)];
        for (reason, counter) in ends {
            let labels = [(MODEL, name.as_str()), ("finished_reason", reason)];
            page.line(FINISHED.name, &labels, counter.get() as f64);
        }
    }
    page.begin(&UNLOADS);
    for ModelFigures { name, series, .. } in models {
        for (reason, n) in series.unloads() {
            page.line(UNLOADS.name, &[(MODEL, name.as_str()), ("reason", reason)], n as f64);
        }
    }
    for (family, value) in &TIMED {
        page.begin(family);
        for model in models {
            page.histogram(family.name, &model.name, &value(&model.series).read());
        }
    }
    machine(&mut page, snapshot);
    page.0.into_bytes()
}

/// What belongs to no model.
fn machine(page: &mut Page, snapshot: &Snapshot) {
    page.begin(&REQUESTS);
    for (asked, n) in &snapshot.requests {
        let status = asked.status.to_string();
        let labels = [("method", asked.method), ("route", asked.route), ("status", &status)];
        page.line(REQUESTS.name, &labels, *n as f64);
    }
    page.one(&BUDGET, snapshot.figures.budget_bytes as f64);
    page.one(&USED, snapshot.figures.used_bytes as f64);
    page.begin(&STORE);
    if let Some(usage) = &snapshot.usage {
        let others =
            usage.orphan_bytes + usage.deleted_bytes + usage.partial_bytes + usage.kv_bytes;
        let kinds = [
            ("models", usage.total_bytes.saturating_sub(others)),
            ("orphans", usage.orphan_bytes),
            ("deleted", usage.deleted_bytes),
            ("partials", usage.partial_bytes),
            ("kv", usage.kv_bytes),
        ];
        for (kind, bytes) in kinds {
            page.line(STORE.name, &[("kind", kind)], bytes as f64);
        }
    }
    page.one(&PULLS, snapshot.n_pulls as f64);
    page.one(&PULLED, snapshot.pull_bytes as f64);
    page.one(&DROPPED, snapshot.spans_dropped as f64);
    page.begin(&BUILD);
    page.line(BUILD.name, &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
}

/// The text so far.
#[derive(Default)]
struct Page(String);

impl Page {
    /// The lines above a family's figures.
    fn begin(&mut self, family: &Family) {
        let Family { name, kind, help } = family;
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        // Writing to a string cannot fail; so below.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// A family of one figure.
    fn one(&mut self, family: &Family, value: f64) {
        self.begin(family);
        self.line(family.name, &[], value);
    }

    /// A family of one figure a model.
    fn of_models(
        &mut self,
        family: &Family,
        models: &[ModelFigures],
        value: impl Fn(&ModelFigures) -> f64,
    ) {
        self.begin(family);
        for model in models {
            self.line(family.name, &[(MODEL, model.name.as_str())], value(model));
        }
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.0.push_str(name);
        for (at, (label, text)) in labels.iter().enumerate() {
            let open = if at == 0 { '{' } else { ',' };
            let _ = write!(self.0, "{open}{label}=\"{}\"", escaped(text));
        }
        let close = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{close} {value}");
    }

    fn histogram(&mut self, name: &str, model: &str, read: &Distribution) {
        let bucket = format!("{name}_bucket");
        for (bound, n) in &read.within {
            let bound = bound.to_string();
            self.line(&bucket, &[(MODEL, model), ("le", &bound)], *n as f64);
        }
        self.line(&bucket, &[(MODEL, model), ("le", "+Inf")], read.count as f64);
        self.line(&format!("{name}_sum"), &[(MODEL, model)], read.sum_s);
        self.line(&format!("{name}_count"), &[(MODEL, model)], read.count as f64);
    }
}

/// A label's text as the format wants it.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::Arc};

    use v4_supervisor::Figures;

    use super::*;
    use crate::ops::metrics::Asked;

    fn text(snapshot: &Snapshot) -> String {
        String::from_utf8(page(snapshot)).expect("text")
    }

    fn model(name: &str) -> ModelFigures {
        let now = Now { running: 2, waiting: 1, bytes: 7, blocks_used: 3, blocks_total: 4 };
        ModelFigures { name: name.to_owned(), now, series: Arc::new(Series::default()) }
    }

    #[test]
    fn labels_are_escaped_and_figures_whole() {
        let figures =
            Figures { budget_bytes: 1 << 53, used_bytes: 9, models: vec![model("a\"b\\c\nd")] };
        let asked = Asked { method: "GET", route: "/v1/models/{*model}", status: 404 };
        let requests = vec![(asked, 3)];
        let usage = v4_store::Usage { total_bytes: 10, orphan_bytes: 3, ..Default::default() };
        let text = text(&Snapshot {
            figures,
            requests,
            usage: Some(usage),
            n_pulls: 1,
            pull_bytes: u64::from(u32::MAX) + 1,
            spans_dropped: 7,
        });
        for line in [
            "vllm:num_requests_running{model_name=\"a\\\"b\\\\c\\nd\"} 2",
            "vllm:kv_cache_usage_perc{model_name=\"a\\\"b\\\\c\\nd\"} 0.75",
            "v4_http_requests_total{method=\"GET\",route=\"/v1/models/{*model}\",status=\"404\"} 3",
            "v4_memory_budget_bytes 9007199254740992",
            "v4_store_bytes{kind=\"models\"} 7",
            "v4_store_bytes{kind=\"orphans\"} 3",
            "v4_pull_bytes_total 4294967296",
            "v4_otlp_spans_dropped_total 7",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn a_histogram_ends_with_infinity_its_sum_and_its_count() {
        let read = Distribution { within: vec![(0.001, 1), (10.0, 3)], count: 4, sum_s: 99.5 };
        let mut page = Page::default();
        page.histogram("h", "m", &read);
        let expected = "h_bucket{model_name=\"m\",le=\"0.001\"} 1\n\
                        h_bucket{model_name=\"m\",le=\"10\"} 3\n\
                        h_bucket{model_name=\"m\",le=\"+Inf\"} 4\n\
                        h_sum{model_name=\"m\"} 99.5\n\
                        h_count{model_name=\"m\"} 4\n";
        assert_eq!(page.0, expected);
    }

    #[test]
    fn every_family_is_introduced_once_before_its_lines() {
        let figures = Figures { models: vec![model("a"), model("b")], ..Figures::default() };
        let text = text(&Snapshot { figures, ..Snapshot::default() });
        let mut seen = BTreeSet::new();
        let mut current = "";
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                current = rest.split(' ').next().expect("a name");
                assert!(seen.insert(current), "{current} comes twice");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                assert!(rest.starts_with(current), "{line}");
            } else {
                let name = line.split(['{', ' ']).next().expect("a name");
                let own = ["_bucket", "_sum", "_count"].map(|end| format!("{current}{end}"));
                assert!(name == current || own.iter().any(|own| own == name), "{line}");
            }
        }
        assert_eq!(seen.len(), NOW.len() + COUNTED.len() + TIMED.len() + 10);
    }
}
