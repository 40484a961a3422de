//! Ollama's variables: those that mean something here, and why the others do not.

use super::Ignored;

/// A variable of Ollama that says what one of our settings says.
pub struct Theirs {
    /// Its name.
    pub name: &'static str,
    /// Its words as ours.
    pub turn: fn(&str) -> String,
}

/// The words are the same.
pub fn same(text: &str) -> String {
    text.to_owned()
}

/// `OLLAMA_HOST` is a URL with its usual port where it says `http://`.
pub fn host(text: &str) -> String {
    let rest = text.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
    match rest {
        Some(rest) if rest.parse::<std::net::IpAddr>().is_ok() => format!("{rest}:80"),
        _ => text.to_owned(),
    }
}

/// `OLLAMA_DEBUG` counts: 1 is debug, 2 is trace.
pub fn debug(text: &str) -> String {
    let level = match text {
        "0" | "false" => "info",
        "1" | "true" => "debug",
        "2" => "trace",
        other => other,
    };
    level.to_owned()
}

/// What Ollama knows and v4 has no use for, and why.
pub const WITHOUT_USE: &[(&str, &str)] = &[
    ("OLLAMA_MODELS", "v4 writes to V4_HOME; `v4 roots add FOLDER` reads Ollama's in place"),
    ("OLLAMA_MAX_LOADED_MODELS", "v4 counts bytes, not models: V4_MEMORY bounds them"),
    ("OLLAMA_LOAD_TIMEOUT", "a load that makes no progress for two minutes is given up"),
    ("OLLAMA_FLASH_ATTENTION", "there is one attention, which is of that kind"),
    ("OLLAMA_GPU_OVERHEAD", "models run on the processor; V4_MEMORY bounds what they take"),
    ("OLLAMA_SCHED_SPREAD", "models run on the processor"),
    ("OLLAMA_IGPU_ENABLE", "models run on the processor"),
    ("OLLAMA_VULKAN", "models run on the processor"),
    ("OLLAMA_LLM_LIBRARY", "the best instructions of the processor are found at run time"),
    ("OLLAMA_NOPRUNE", "v4 keeps what no name needs for seven days, and partial downloads too"),
    ("OLLAMA_MAX_TRANSFER_STREAMS", "how many ranges are read at a time is found out as it goes"),
    ("OLLAMA_GO_TEMPLATE", "the template of the model's own file is used"),
    ("OLLAMA_DEBUG_LOG_REQUESTS", "prompts and answers are never in the log"),
    ("OLLAMA_REMOTES", "nothing here runs elsewhere"),
    ("OLLAMA_NO_CLOUD", "nothing here runs elsewhere"),
    ("OLLAMA_CLOUD_BASE_URL", "nothing here runs elsewhere"),
    ("OLLAMA_AUTH", "`v4 keys` says who may call"),
];

/// Those of [`WITHOUT_USE`] that are set.
pub fn without_use(variable: impl Fn(&str) -> Option<String>) -> Vec<Ignored> {
    let set = WITHOUT_USE.iter().filter_map(|(name, why)| Some((*name, variable(name)?, *why)));
    set.map(|(variable, value, why)| Ignored { variable, value, why: why.to_owned() }).collect()
}
