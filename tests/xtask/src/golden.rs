//! `cargo xtask golden`: pages that are made from the code, so that they cannot be wrong.
//!
//! The numbers under `tests/golden` come from reference implementations in Python; its README says
//! how. What is made here is `docs/reference.md`.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use v4_modelfile::library;
use v4_proto::Code;

use crate::ROOT;

const PAGE: &str = "docs/reference.md";

/// Files with limits, and what they bound.
const LIMITS: &[(&str, &str)] = &[
    ("daemon/server/src/limits.rs", "Clients"),
    ("daemon/proto/src/limits.rs", "Frames and model files"),
    ("daemon/pull/src/limits.rs", "Pulls"),
    ("daemon/supervisor/src/limits.rs", "Runners"),
    ("daemon/runner/src/limits.rs", "Inside a runner"),
    ("daemon/engine/src/limits.rs", "Inside the engine"),
    ("daemon/store/src/limits.rs", "The store"),
];

#[derive(clap::Args)]
pub struct Args {
    /// Only compare: fail if a committed page is not what the code says.
    #[arg(long)]
    check: bool,
}

/// Writes or compares the pages.
///
/// # Errors
/// A source cannot be read, or the committed page differs.
pub fn run(Args { check }: Args) -> Result<(), String> {
    if check { self::check() } else { make() }
}

fn make() -> Result<(), String> {
    let path = Path::new(ROOT).join(PAGE);
    let made = page(Path::new(ROOT))?;
    fs::create_dir_all(path.parent().expect("it has a folder")).map_err(|e| e.to_string())?;
    fs::write(&path, made).map_err(|error| error.to_string())?;
    println!("{PAGE} made");
    Ok(())
}

/// Compares the committed pages with what the code says.
///
/// # Errors
/// They differ, or a source cannot be read.
pub fn check() -> Result<(), String> {
    let committed = fs::read_to_string(Path::new(ROOT).join(PAGE)).unwrap_or_default();
    if committed != page(Path::new(ROOT))? {
        return Err(format!("{PAGE} is not what the code says: run `cargo xtask golden`"));
    }
    println!("{PAGE} is what the code says");
    Ok(())
}

fn page(root: &Path) -> Result<String, String> {
    let read = |path: &str| {
        fs::read_to_string(root.join(path)).map_err(|error| format!("{path}: {error}"))
    };
    let mut page =
        "# Reference\n\nMade from the code by `cargo xtask golden`; not edited by hand.\n"
            .to_owned();
    settings(&mut page, &read("daemon/server/src/config.rs")?);
    codes(&mut page, &read("daemon/proto/src/fault.rs")?, &read("daemon/server/src/error.rs")?)?;
    routes(&mut page, &read("daemon/server/src/routes.rs")?);
    metrics(&mut page, &read("daemon/server/src/api/prometheus.rs")?);
    models(&mut page);
    page.push_str("\n## Limits\n");
    for (path, title) in LIMITS {
        let _ = writeln!(page, "\n### {title}\n\n| limit | value | what and why |\n|---|---|---|");
        for (name, value, why) in constants(&read(path)?) {
            let _ = writeln!(page, "| `{name}` | `{value}` | {why} |");
        }
    }
    Ok(page)
}

/// What the paths begin with that Ollama has; others of its surface are v4's own.
const OLLAMAS: &[&str] = &[
    "/api/blobs/",
    "/api/chat",
    "/api/copy",
    "/api/create",
    "/api/delete",
    "/api/embed",
    "/api/embeddings",
    "/api/generate",
    "/api/ps",
    "/api/pull",
    "/api/push",
    "/api/show",
    "/api/tags",
    "/api/version",
    "/",
];

/// The settings, each as its declaration has it.
fn settings(page: &mut String, source: &str) {
    page.push_str(
        "\n## Settings\n\nA switch of `v4 serve` comes before a variable, a variable before the file, the \
         file before a variable of Ollama or OpenTelemetry. The file is `config.toml` in the home, or what `V4_CONFIG` \
         names (`off` reads none): TOML, with the keys below, whose values are in the same words; lists \
         may be lists. `v4 config` shows what counts and who said it. `v4 config --reload` and SIGHUP \
         have the file read again: what is live changes at once, the rest at the next start, and a file \
         with a mistake changes nothing. Paths may begin with `~/` or `$V4_HOME/`.\n\n\
         ```toml\nkeep_alive = \"10m\"\nquota = \"200G\"\npeers = [\"http://10.0.0.2:11434\"]\n\n\
         [model.\"qwen3:8b\"]\nkeep_alive = -1   # instead of the one above\n\
         preload = true    # loaded when v4 starts\n\
         pin = true        # never unloaded to make room\n\
         slots = 4         # sequences at a time, as context and max_queue instead of those above\n\
         priority = 1      # has memory before others: -128 to 127, 0 is usual\n\
         group = \"code\"    # stays in memory together with others of the group\n\
         excludes = [\"gemma3*\"] # never in memory at the same time\n\
         device = \"gpu0\"   # or a GPU's UUID, or \"host\"; what does not fit a GPU goes to the host\n\
         gpus = 2          # over so many GPUs at most\n```\n\n\
         `preload` counts at the next start, all else at once; a model that is loaded is loaded again when \
         nobody uses it where its `slots` or `context` have changed.\n\n\
         | key | variable | default | live | what it says |\n|---|---|---|---|---|\n",
    );
    for Declared { key, words, is_live, said } in declared(source) {
        let [variable, default, theirs] = words;
        let theirs = theirs.map(|name| format!("<br>`{name}`")).unwrap_or_default();
        let default = default.filter(|text| !text.is_empty());
        let default = default.map(|text| format!("`{text}`")).unwrap_or_default();
        let (variable, live) = (variable.unwrap_or_default(), if is_live { "yes" } else { "" });
        let _ = writeln!(page, "| `{key}` | `{variable}`{theirs} | {default} | {live} | {said} |");
    }
    page.push_str(
        "\n`V4_HOME` is the folder of blobs, names and the index, `V4_SOCKET` the unix socket. The other \
         commands know both too, and `V4_HOST`: the daemon at `http://HOST:PORT` instead of this \
         user's own, with the key that it wants in `V4_KEY`. Pulls and pushes go through the proxies \
         that `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` name. Those of Ollama's variables that mean \
         nothing here are named with the reason by `v4 config` where they are set. Sockets that systemd \
         listens on for the service (`LISTEN_FDS`) are served instead of `listen` and `V4_SOCKET`; it is \
         told (`NOTIFY_SOCKET`) when v4 is ready and which process serves, which `v4 serve --replace` \
         changes: `Type=notify` and `NotifyAccess=all`.\n",
    );
}

/// A setting as `settings!` declares it.
struct Declared<'a> {
    key: &'a str,
    /// Variable, default, Ollama's variable.
    words: [Option<&'a str>; 3],
    is_live: bool,
    said: String,
}

/// The declarations of `settings!`.
fn declared(source: &str) -> Vec<Declared<'_>> {
    let list = source.split("\nsettings! {\n").nth(1).and_then(|rest| rest.split("\n}\n").next());
    let items = commented(list.unwrap_or_default(), "pub ").into_iter();
    let declared = items.filter_map(|(said, line)| {
        let mut words = line.split('"').skip(1).step_by(2);
        Some(Declared {
            key: line.strip_prefix("pub ")?.split(':').next()?,
            words: [words.next(), words.next(), words.next()],
            is_live: line.contains(", Live, "),
            said,
        })
    });
    declared.collect()
}

/// Every error code with its status and meaning.
fn codes(page: &mut String, faults: &str, statuses: &str) -> Result<(), String> {
    page.push_str(
        "\n## Error codes\n\nThe list is closed. A stream that has begun ends with an error event \
         instead of a status.\n\n| code | status | meaning |\n|---|---|---|\n",
    );
    for code in Code::ALL {
        let variant = format!("{code:?}");
        let name = serde_json::to_value(code).map_err(|error| error.to_string())?;
        let meaning = commented(faults, "")
            .into_iter()
            .find(|(_, line)| line.trim_end_matches(',') == variant)
            .map(|(comment, _)| comment)
            .ok_or_else(|| format!("{variant} has no comment"))?;
        // The table in the tests of `server::error` names every code with its number.
        let status = statuses
            .split(&format!("(Code::{variant}, "))
            .nth(1)
            .and_then(|rest| rest.split(',').next())
            .ok_or_else(|| format!("{variant} has no status in the table of server::error"))?;
        let name = name.as_str().unwrap_or_default();
        let _ = writeln!(page, "| `{name}` | {status} | {meaning} |");
    }
    Ok(())
}

/// Every endpoint, as the table in the source has it.
fn routes(page: &mut String, source: &str) {
    page.push_str(
        "\n## Routes\n\n`GET` routes answer `HEAD` too. Those that are v4's own take and give JSON with \
         the fields of the command that uses them. Where keys are wanted (`V4_KEYS`), the last column \
         is the scope that a key must have at least: `read`, `use` or `admin`. The unix socket needs none. \
         Without a key that is known the answer is 401, with one of a lesser scope 403. `admin*` is \
         never without a key over TCP.\n\n| method | path | whose words | scope |\n|---|---|---|---|\n",
    );
    let table = source.split("static ROUTES").nth(1).and_then(|rest| rest.split("];").next());
    for line in table.unwrap_or_default().lines().map(str::trim) {
        let inside = line.strip_prefix("route(Method::").and_then(|rest| rest.split_once(", "));
        let Some((method, rest)) = inside else { continue };
        let path = rest.split('"').nth(1).unwrap_or_default();
        let word = |of: &str| rest.split(of).nth(1).and_then(|rest| rest.split(',').next());
        let surface = word("Surface::");
        let scope = match word("Scope::").unwrap_or_default() {
            "Open" => "-".to_owned(),
            "Owner" => "admin*".to_owned(),
            scope => scope.to_lowercase(),
        };
        let is_ollamas = OLLAMAS.contains(&path) || path.starts_with(OLLAMAS[0]);
        let whose = match surface.unwrap_or_default() {
            "Ollama" if !is_ollamas => "v4",
            "OpenAi" => "OpenAI",
            "Oci" => "registries",
            surface => surface,
        };
        let _ = writeln!(page, "| {method} | `{path}` | {whose} | {scope} |");
    }
}

/// The metrics: every call that introduces one names it and says what it is.
fn metrics(page: &mut String, source: &str) {
    page.push_str(
        "\n## Metrics\n\n`GET /metrics` in Prometheus' text format. Names of vLLM mean what they \
         mean there. Those of models have the label `model_name`; models beyond the first \
         `COUNTED_MODELS` are counted as `other`. Tokens are counted when an answer ends, what the \
         engine says of itself comes every second.\n\n| metric | kind | meaning |\n|---|---|---|\n",
    );
    let product = source.split("#[cfg(test)]").next().unwrap_or_default();
    for (at, _) in product.match_indices('(') {
        let kind = ["gauge", "counter", "histogram"];
        let kind = kind.into_iter().find(|kind| product[..at].ends_with(kind));
        let mut texts = product[at..].split('"').skip(1).step_by(2);
        let is_call = product[at + 1..].trim_start().starts_with('"');
        if let (Some(kind), true, Some(name), Some(help)) =
            (kind, is_call, texts.next(), texts.next())
        {
            let _ = writeln!(page, "| `{name}` | {kind} | {help} |");
        }
    }
}

/// The library of models.
fn models(page: &mut String) {
    page.push_str(
        "\n## Models that ship as names\n\n| name | bytes | sha256 | from |\n|---|---|---|---|\n",
    );
    for entry in library::all() {
        let modelfile = entry.modelfile();
        for file in modelfile.files() {
            let size = file.size.map(|size| size.to_string()).unwrap_or_default();
            let digest = file.digest.map_or("not checked here; the hub's".to_owned(), |digest| {
                format!("`{}`", digest.trim_start_matches("sha256:"))
            });
            let sources = file.sources.iter().copied().flatten().map(|part| format!("`{part}`"));
            let mut sources = sources.collect::<Vec<_>>().join("<br>");
            if sources.is_empty() {
                sources = format!("`{}`", file.from);
            }
            let _ = writeln!(page, "| `{}` | {size} | {digest} | {sources} |", entry.name());
        }
    }
}

/// The constants of a source: name, value, comment.
fn constants(source: &str) -> Vec<(String, String, String)> {
    let mut found = Vec::new();
    for (comment, line) in commented(source, "") {
        let line = line.strip_prefix("pub(crate) ").or(line.strip_prefix("pub ")).unwrap_or(line);
        let Some(rest) = line.strip_prefix("const ") else { continue };
        let Some((name, value)) = rest.split_once(':') else { continue };
        let value = value.split_once('=').map_or("", |(_, value)| value);
        let value = value.trim().trim_end_matches(';');
        found.push((name.to_owned(), value.to_owned(), comment.replace('|', "\\|")));
    }
    found
}

/// Every doc comment of the product, joined, with the line it stands above when that begins with
/// `prefix`.
fn commented<'a>(source: &'a str, prefix: &str) -> Vec<(String, &'a str)> {
    let product = source.split("#[cfg(test)]").next().unwrap_or_default();
    let mut found = Vec::new();
    let mut comment = String::new();
    for line in product.lines().map(str::trim) {
        if let Some(text) = line.strip_prefix("///") {
            if !comment.is_empty() {
                comment.push(' ');
            }
            comment.push_str(&text.trim().replace("[`", "`").replace("`]", "`"));
        } else if !line.starts_with("#[") {
            if !comment.is_empty() && line.starts_with(prefix) {
                found.push((comment.clone(), line));
            }
            comment.clear();
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_found_where_they_are_introduced() {
        let source = "const fn gauge(name: &str) {}\nconst A: F =\n gauge(\"v4_a\", \"What.\");\n\
                      h(histogram(\n\"v4_b\", \"How long.\"));\n\
                      #[cfg(test)]\ngauge(\"v4_c\", \"x\")";
        let mut page = String::new();
        metrics(&mut page, source);
        let table =
            "|---|---|---|\n| `v4_a` | gauge | What. |\n| `v4_b` | histogram | How long. |\n";
        assert!(page.ends_with(table), "{page}");
    }

    #[test]
    fn settings_are_found_where_they_are_declared() {
        let source = concat!(
            "x\nsettings! {\n    /// What;\n    /// it is.\n",
            "    pub a: T<B> = \"V4_A\", \"\", Live, f;\n    /// B.\n",
            "    pub b: C = \"V4_B\", \"5m\", Start, f, \"OLLAMA_B\" same;\n}\n/// No.\n"
        );
        let mut page = String::new();
        settings(&mut page, source);
        assert!(
            page.contains("|---|\n| `a` | `V4_A` |  | yes | What; it is. |\n| `b` |"),
            "{page}"
        );
        assert!(page.contains("| `b` | `V4_B`<br>`OLLAMA_B` | `5m` |  | B. |\n\n"), "{page}");
    }

    #[test]
    fn comments_belong_to_the_line_below_them() {
        let source = "/// One\n/// more.\n#[attr]\npub const A: u64 = 1 << 2;\n\nconst B: u8 = 3;\n\
                      #[cfg(test)]\n/// Not this.\nconst C: u8 = 4;\n";
        let expected = [("A".to_owned(), "1 << 2".to_owned(), "One more.".to_owned())];
        assert_eq!(constants(source), expected);
    }
}
