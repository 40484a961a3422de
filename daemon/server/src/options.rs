//! The named options of a request and of a model's `params` role: the one table of names, types
//! and limits.

use serde_json::{Map, Value};
use v4_proto::{Fault, Lane, SamplingParams, limits};

use crate::limits::ECHO_CHARS;

/// What a request, a model or a surface says about how an answer is made. `None` leaves it to the
/// next in the order: request, model, surface, then Ollama's defaults.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options {
    /// See [`SamplingParams::temperature`].
    pub temperature: Option<f32>,
    /// See [`SamplingParams::top_k`].
    pub top_k: Option<u32>,
    /// See [`SamplingParams::top_p`].
    pub top_p: Option<f32>,
    /// See [`SamplingParams::min_p`].
    pub min_p: Option<f32>,
    /// See [`SamplingParams::typical_p`].
    pub typical_p: Option<f32>,
    /// See [`SamplingParams::repeat_penalty`].
    pub repeat_penalty: Option<f32>,
    /// See [`SamplingParams::repeat_last_n`].
    pub repeat_last_n: Option<i32>,
    /// See [`SamplingParams::presence_penalty`].
    pub presence_penalty: Option<f32>,
    /// See [`SamplingParams::frequency_penalty`].
    pub frequency_penalty: Option<f32>,
    /// -1 draws one.
    pub seed: Option<i64>,
    /// Tokens of the answer at most; negative is open.
    pub num_predict: Option<i64>,
    /// Tokens of prompt and answer together at most.
    pub num_ctx: Option<u32>,
    /// Texts that end the answer.
    pub stop: Option<Vec<String>>,
    /// How urgent it is.
    pub lane: Option<Lane>,
}

impl Options {
    /// Reads options by their names. Unknown ones are ignored with a line in the log; those that
    /// only steer another engine (`num_gpu`, `num_batch`, …) are checked and have no effect.
    ///
    /// # Errors
    /// An `invalid` fault when a value has the wrong type or cannot be meant.
    pub fn read(map: &Map<String, Value>) -> Result<Self, Fault> {
        let mut options = Self::default();
        for (name, value) in map {
            if !value.is_null() {
                options.set(name, value)?;
            }
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &Value) -> Result<(), Fault> {
        match name {
            "temperature" => self.temperature = Some(at_least_zero(name, value)?),
            "top_k" => self.top_k = Some(count(name, integer(name, value)?.max(0))?),
            "top_p" => self.top_p = Some(at_least_zero(name, value)?),
            "min_p" => self.min_p = Some(at_least_zero(name, value)?),
            "typical_p" => self.typical_p = Some(at_least_zero(name, value)?),
            "repeat_penalty" => self.repeat_penalty = Some(above_zero(name, value)?),
            "repeat_last_n" => self.repeat_last_n = Some(window(name, value)?),
            "presence_penalty" => self.presence_penalty = Some(float(name, value)?),
            "frequency_penalty" => self.frequency_penalty = Some(float(name, value)?),
            "seed" => self.seed = Some(integer(name, value)?),
            "num_predict" => self.num_predict = Some(integer(name, value)?),
            "num_ctx" => self.num_ctx = Some(count(name, integer(name, value)?.max(NUM_CTX_MIN))?),
            "stop" => self.stop = Some(stop(name, value)?),
            "lane" => {
                let text = value.as_str().ok_or_else(|| wrong_type(name, "string"))?;
                self.lane = Some(lane("option \"lane\"", text)?);
            }
            "num_keep" | "num_batch" | "num_gpu" | "main_gpu" | "num_thread"
            | "draft_num_predict" => drop(integer(name, value)?),
            "use_mmap" if value.is_boolean() => {}
            "use_mmap" => return Err(wrong_type(name, "boolean")),
            _ => {
                let name: String = name.chars().take(ECHO_CHARS).collect();
                tracing::warn!(name, "an unknown option is ignored");
            }
        }
        Ok(())
    }

    /// These options, and those of `lower` where these say nothing.
    pub fn or(self, lower: Self) -> Self {
        Self {
            temperature: self.temperature.or(lower.temperature),
            top_k: self.top_k.or(lower.top_k),
            top_p: self.top_p.or(lower.top_p),
            min_p: self.min_p.or(lower.min_p),
            typical_p: self.typical_p.or(lower.typical_p),
            repeat_penalty: self.repeat_penalty.or(lower.repeat_penalty),
            repeat_last_n: self.repeat_last_n.or(lower.repeat_last_n),
            presence_penalty: self.presence_penalty.or(lower.presence_penalty),
            frequency_penalty: self.frequency_penalty.or(lower.frequency_penalty),
            seed: self.seed.or(lower.seed),
            num_predict: self.num_predict.or(lower.num_predict),
            num_ctx: self.num_ctx.or(lower.num_ctx),
            stop: self.stop.or(lower.stop),
            lane: self.lane.or(lower.lane),
        }
    }

    /// How tokens are chosen, with Ollama's defaults where nothing is said.
    pub fn sampling(&self) -> SamplingParams {
        let base = SamplingParams::default();
        SamplingParams {
            temperature: self.temperature.unwrap_or(base.temperature),
            top_k: self.top_k.unwrap_or(base.top_k),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            typical_p: self.typical_p.unwrap_or(base.typical_p),
            repeat_penalty: self.repeat_penalty.unwrap_or(base.repeat_penalty),
            repeat_last_n: self.repeat_last_n.unwrap_or(base.repeat_last_n),
            presence_penalty: self.presence_penalty.unwrap_or(base.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(base.frequency_penalty),
            seed: self.seed.filter(|&seed| seed != -1).map(i64::cast_unsigned),
        }
    }

    /// Tokens of the answer at most; `None` is open.
    pub fn max_tokens(&self) -> Option<u32> {
        let n = self.num_predict.filter(|&n| n >= 0)?;
        Some(u32::try_from(n).unwrap_or(u32::MAX))
    }
}

/// A lane by its name, which `place` gave.
///
/// # Errors
/// An `invalid` fault for another name.
pub fn lane(place: &str, text: &str) -> Result<Lane, Fault> {
    Lane::named(text).ok_or_else(|| {
        let text: String = text.chars().take(ECHO_CHARS).collect();
        Fault::invalid(format!("{place} must be interactive or background, but is \"{text}\""))
    })
}

/// Smaller values of `num_ctx` mean this, as in Ollama.
const NUM_CTX_MIN: i64 = 4;

fn wrong_type(name: &str, kind: &str) -> Fault {
    Fault::invalid(format!("option \"{name}\" must be of type {kind}"))
}

fn integer(name: &str, value: &Value) -> Result<i64, Fault> {
    if let Some(n) = value.as_i64() {
        return Ok(n);
    }
    // Some clients write every number as a float; the part behind the point is cut off.
    match value.as_f64() {
        #[expect(clippy::cast_possible_truncation, reason = "bounded just before")]
        Some(n) if n.abs() < 9e15 => Ok(n as i64),
        _ => Err(wrong_type(name, "integer")),
    }
}

fn count(name: &str, n: i64) -> Result<u32, Fault> {
    u32::try_from(n).map_err(|_| Fault::invalid(format!("option \"{name}\" is too large: {n}")))
}

fn window(name: &str, value: &Value) -> Result<i32, Fault> {
    let n = integer(name, value)?.max(-1);
    i32::try_from(n).map_err(|_| Fault::invalid(format!("option \"{name}\" is too large: {n}")))
}

fn float(name: &str, value: &Value) -> Result<f32, Fault> {
    #[expect(clippy::cast_possible_truncation, reason = "what does not fit becomes infinite")]
    let n = value.as_f64().ok_or_else(|| wrong_type(name, "float32"))? as f32;
    if n.is_finite() { Ok(n) } else { Err(wrong_type(name, "float32")) }
}

fn at_least_zero(name: &str, value: &Value) -> Result<f32, Fault> {
    match float(name, value)? {
        n if n >= 0.0 => Ok(n),
        n => Err(Fault::invalid(format!("option \"{name}\" must not be negative, but is {n}"))),
    }
}

fn above_zero(name: &str, value: &Value) -> Result<f32, Fault> {
    match float(name, value)? {
        n if n > 0.0 => Ok(n),
        n => Err(Fault::invalid(format!("option \"{name}\" must be above 0, but is {n}"))),
    }
}

/// A list of texts, or one text as a Modelfile may write it. Empty texts would end every answer at
/// once and are left out.
fn stop(name: &str, value: &Value) -> Result<Vec<String>, Fault> {
    let texts = match value {
        Value::String(text) => vec![text.clone()],
        Value::Array(items) => items
            .iter()
            .map(|item| item.as_str().map(str::to_owned).ok_or_else(|| wrong_type(name, "array")))
            .collect::<Result<Vec<_>, _>>()?,
        _ => return Err(wrong_type(name, "array")),
    };
    let texts: Vec<String> = texts.into_iter().filter(|text| !text.is_empty()).collect();
    if texts.len() > limits::STOP_STRINGS {
        return Err(Fault::invalid(format!(
            "there are {} stop strings; at most {} are allowed",
            texts.len(),
            limits::STOP_STRINGS
        )));
    }
    if let Some(text) = texts.iter().find(|text| text.len() > limits::STOP_STRING_BYTES) {
        return Err(Fault::invalid(format!(
            "a stop string has {} bytes; at most {} are allowed",
            text.len(),
            limits::STOP_STRING_BYTES
        )));
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: &Value) -> Result<Options, Fault> {
        Options::read(value.as_object().expect("an object"))
    }

    #[test]
    fn every_option_has_its_type() {
        let kinds = [
            ("integer", "num_ctx num_predict top_k seed repeat_last_n num_keep num_batch num_gpu"),
            ("integer", "main_gpu num_thread draft_num_predict"),
            ("float32", "temperature top_p min_p typical_p repeat_penalty presence_penalty"),
            ("float32", "frequency_penalty"),
            ("boolean", "use_mmap"),
            ("array", "stop"),
            ("string", "lane"),
        ];
        for (kind, names) in kinds {
            for name in names.split(' ') {
                let fault = read(&json!({ name: {"an": "object"} })).expect_err(name);
                assert_eq!(fault, wrong_type(name, kind));
                let fault = read(&json!({ name: 7, "stop": [1] })).expect_err(name);
                assert!(fault.message.starts_with("option \""), "{name}");
            }
        }
    }

    #[test]
    fn values_arrive_and_null_says_nothing() {
        let options = read(&json!({
            "temperature": 0, "top_k": 5.0, "seed": 7, "num_predict": -1, "num_ctx": 1,
            "stop": "END", "repeat_last_n": -3, "top_p": null, "unheard_of": [1]
        }))
        .expect("valid");
        let sampling = options.sampling();
        assert_eq!((sampling.temperature, sampling.top_k, sampling.seed), (0.0, 5, Some(7)));
        assert_eq!((sampling.top_p, sampling.repeat_last_n), (0.9, -1));
        assert_eq!((options.max_tokens(), options.num_ctx), (None, Some(4)));
        assert_eq!(options.stop, Some(vec!["END".to_owned()]));
        assert_eq!(read(&json!({"seed": -1})).expect("valid").sampling().seed, None);
    }

    #[test]
    fn the_request_comes_before_the_model() {
        let request = read(&json!({"temperature": 0.1})).expect("valid");
        let model = read(&json!({"temperature": 0.5, "top_k": 3, "lane": "background"}));
        let merged = request.or(model.expect("valid"));
        assert_eq!(merged.lane, Some(Lane::Background));
        assert_eq!((merged.temperature, merged.top_k), (Some(0.1), Some(3)));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for bad in [
            json!({"temperature": -0.5}),
            json!({"lane": "fast"}),
            json!({"temperature": 1e300}),
            json!({"repeat_penalty": 0}),
            json!({"num_ctx": 5_000_000_000_u64}),
            json!({"repeat_last_n": 5_000_000_000_u64}),
            json!({"seed": 1e30}),
            json!({"stop": vec!["a"; limits::STOP_STRINGS + 1]}),
            json!({"stop": ["a".repeat(limits::STOP_STRING_BYTES + 1)]}),
        ] {
            read(&bad).expect_err("refused");
        }
        read(&json!({"stop": vec!["a"; limits::STOP_STRINGS]})).expect("the most there may be");
    }
}
