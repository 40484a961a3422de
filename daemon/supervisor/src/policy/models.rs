//! What a person has said of single models: limits, a place in memory that they keep, what goes
//! first, and which of them belong together or exclude one another.

use std::collections::BTreeMap;

use v4_proto::ModelName;

use super::key;
use crate::KeepAlive;

/// The rules of one model. What is not said is as for all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelRules {
    /// Once loaded it stays, until somebody unloads it by name or the daemon ends.
    pub pinned: bool,
    /// How long it stays after an ask that does not say.
    pub keep_alive: Option<KeepAlive>,
    /// Asks that may wait for it.
    pub max_queue: Option<usize>,
    /// Sequences at a time.
    pub slots: Option<u32>,
    /// Tokens of context a sequence gets, at most what the model was trained for.
    pub context: Option<u32>,
    /// Zero is usual. Those of a higher one keep their memory before those of a lower one and get
    /// it without waiting for a quantum; a step up counts as
    /// [`limits::PRIORITY_STEP`](crate::limits::PRIORITY_STEP) of waiting.
    pub priority: i8,
    /// Models of one group are used together: one leaves for another only where nothing else helps,
    /// and none is idle while another is in use.
    pub group: Option<String>,
    /// The one device that it lies on, by name (`gpu0`), UUID or `host`; what does not fit a GPU
    /// goes to the host.
    pub device: Option<String>,
    /// Over so many GPUs at most.
    pub gpus: Option<u32>,
    /// Names, or patterns of names, of models that are never in memory at the same time.
    pub excludes: Vec<String>,
}

/// The rules of all models that have any, by name or by a pattern with one `*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelTable {
    rules: BTreeMap<String, ModelRules>,
    usual: ModelRules,
}

impl ModelTable {
    /// Of names and patterns. A name without a tag means that with `latest`.
    pub fn new(rules: impl IntoIterator<Item = (String, ModelRules)>) -> Self {
        let rules = rules.into_iter().map(|(pattern, rules)| (canonical(&pattern), rules));
        Self { rules: rules.collect(), usual: ModelRules::default() }
    }

    /// The rules of a model: of its name, else of the longest pattern that it fits.
    pub fn of(&self, key: &str) -> &ModelRules {
        let fitting = self.rules.iter().filter(|(pattern, _)| fits(pattern, key));
        // A name has no `*` and is as long as the key, a pattern with its `*` may be longer.
        let best = fitting.max_by_key(|(pattern, _)| (!pattern.contains('*'), pattern.len()));
        best.map_or(&self.usual, |(_, rules)| rules)
    }

    /// Whether two models are never in memory at the same time.
    pub fn exclude(&self, a: &str, b: &str) -> bool {
        let says = |one: &str, other: &str| {
            self.of(one).excludes.iter().any(|pattern| fits(&canonical(pattern), other))
        };
        a != b && (says(a, b) || says(b, a))
    }

    /// Whether two models are used together.
    pub fn together(&self, a: &str, b: &str) -> bool {
        let group = &self.of(a).group;
        group.is_some() && *group == self.of(b).group
    }
}

/// A name as it is looked up; a pattern in small letters.
fn canonical(pattern: &str) -> String {
    match pattern.parse::<ModelName>() {
        Ok(name) if !pattern.contains('*') => key(&name),
        _ => pattern.to_ascii_lowercase(),
    }
}

/// Whether a name fits a pattern with at most one `*`.
fn fits(pattern: &str, key: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == key,
        Some((start, end)) => {
            key.len() >= start.len() + end.len() && key.starts_with(start) && key.ends_with(end)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_before_a_pattern_and_a_long_pattern_before_a_short_one() {
        let rules = |priority| ModelRules { priority, ..ModelRules::default() };
        let table = ModelTable::new([
            ("*".to_owned(), rules(1)),
            ("Qwen*".to_owned(), rules(2)),
            ("qwen*:0.5b".to_owned(), rules(3)),
            ("Qwen2.5-coder:0.5b".to_owned(), rules(4)),
            ("smollm2".to_owned(), rules(5)),
        ]);
        let of = |name: &str| table.of(&key(&name.parse().expect("a name"))).priority;
        assert_eq!(of("llama"), 1);
        assert_eq!(of("qwen3"), 2);
        assert_eq!(of("QWEN3:0.5b"), 3);
        assert_eq!(of("qwen2.5-coder:0.5b"), 4);
        assert_eq!(of("SmolLM2:latest"), 5);
        assert_eq!(of("smollm2:135m"), 1);
        assert_eq!(ModelTable::default().of("x:latest"), &ModelRules::default());
    }

    #[test]
    fn one_that_excludes_another_is_excluded_by_it() {
        let rules = ModelRules { excludes: vec!["big*".into(), "a".into()], ..Default::default() };
        let table = ModelTable::new([("a".to_owned(), rules)]);
        assert!(table.exclude("a:latest", "big:70b") && table.exclude("big:70b", "a:latest"));
        assert!(!table.exclude("a:latest", "a:latest"), "no model excludes itself");
        assert!(!table.exclude("big:70b", "big:8b"));
    }

    #[test]
    fn together_are_those_of_one_group() {
        let of = |group: &str| ModelRules { group: Some(group.into()), ..Default::default() };
        let table = ModelTable::new([
            ("a".to_owned(), of("x")),
            ("b".to_owned(), of("x")),
            ("c".to_owned(), of("y")),
        ]);
        assert!(table.together("a:latest", "b:latest"));
        assert!(!table.together("a:latest", "c:latest"));
        assert!(!table.together("d:latest", "e:latest"), "no group is no group");
    }
}
