//! One answer, with the times at which its pieces came.

use std::time::Instant;

use serde_json::{Value, json};
use v4_tests::http::{Address, Stream};

use crate::bench::noise::Noise;

/// Whose language a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Ollama's, which ours speaks.
    Ollama,
    /// That of `llama-server`.
    Llama,
}

/// Who is asked.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Whether no token may come twice: what repeats comes several tokens a step.
    pub is_fresh: bool,
    /// Where it listens.
    pub address: Address,
    /// How to speak with it.
    pub dialect: Dialect,
    /// The model's name.
    pub model: String,
}

/// An answer; times are seconds from the request on.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// When each piece of text came.
    pub pieces: Vec<f64>,
    /// When it had ended.
    pub seconds: f64,
    /// Tokens of the prompt, those that were not read again included.
    pub n_prompt: usize,
    /// Tokens of the answer.
    pub n_tokens: usize,
    /// Seconds that the server says it read the prompt for; ours alone does.
    pub read: f64,
}

impl Answer {
    /// The time to the first piece of text.
    pub fn first(&self) -> f64 {
        self.pieces.first().copied().unwrap_or(self.seconds)
    }

    /// Tokens a second after the first.
    pub fn rate(&self) -> f64 {
        self.n_tokens.saturating_sub(1) as f64 / (self.seconds - self.first())
    }
}

impl Asked {
    /// Asks for `n` tokens after the prompt and reads all of the answer.
    ///
    /// # Errors
    /// The server refuses or breaks off.
    pub fn ask(&self, prompt: &str, n: usize) -> Result<Answer, String> {
        self.ask_while(prompt, n, |_| true)
    }

    /// The same until `goes_on` says no to what has come; then the connection is dropped.
    ///
    /// # Errors
    /// The server refuses or breaks off.
    pub fn ask_while(
        &self,
        prompt: &str,
        n: usize,
        mut goes_on: impl FnMut(&Answer) -> bool,
    ) -> Result<Answer, String> {
        let begin = Instant::now();
        let mut stream = self.send(prompt, n);
        let mut answer = Answer::default();
        let broken = |error: std::io::Error| format!("the answer broke off: {error}");
        while let Some(line) = stream.line().map_err(broken)? {
            let text = line.strip_prefix("data: ").unwrap_or(&line);
            let Ok(event) = serde_json::from_str::<Value>(text) else { continue };
            let is_last = self.take(&event, begin, &mut answer)?;
            answer.seconds = begin.elapsed().as_secs_f64();
            if is_last || !goes_on(&answer) {
                break;
            }
        }
        Ok(answer)
    }

    fn send(&self, prompt: &str, n: usize) -> Stream {
        let penalty = if self.is_fresh { 1e4 } else { 0.0 };
        let options = json!({ "num_predict": n, "temperature": 0, "presence_penalty": penalty });
        match self.dialect {
            Dialect::Ollama => self.address.patient_stream(
                "/api/generate",
                &json!({ "model": self.model, "prompt": prompt, "raw": true, "options": options }),
            ),
            Dialect::Llama => self.address.patient_stream(
                "/completion",
                &json!({
                    "prompt": prompt, "n_predict": n, "temperature": 0, "stream": true,
                    "ignore_eos": true,
                }),
            ),
        }
    }

    /// Adds what an event says; whether it is the last.
    fn take(&self, event: &Value, begin: Instant, answer: &mut Answer) -> Result<bool, String> {
        if !event["error"].is_null() {
            return Err(format!("the server says {event}"));
        }
        let [piece, done, n_prompt, n_tokens] = match self.dialect {
            Dialect::Ollama => ["response", "done", "prompt_eval_count", "eval_count"],
            Dialect::Llama => ["content", "stop", "tokens_evaluated", "tokens_predicted"],
        };
        let piece = event[piece].as_str().unwrap_or_default();
        if !piece.is_empty() {
            answer.text += piece;
            answer.pieces.push(begin.elapsed().as_secs_f64());
        }
        let is_last = event[done] == true;
        let count = |name: &str| event[name].as_u64().and_then(|n| usize::try_from(n).ok());
        if is_last {
            answer.n_prompt = count(n_prompt).unwrap_or(0);
            answer.n_tokens = count(n_tokens).unwrap_or(0);
            answer.read = event["prompt_eval_duration"].as_f64().unwrap_or(0.0) / 1e9;
        }
        Ok(is_last)
    }

    /// A prompt of about `n` tokens, by the length of a shorter one.
    ///
    /// # Errors
    /// The server refuses.
    pub fn prompt_of(&self, n: usize, seed: u64) -> Result<String, String> {
        const SAMPLE: usize = 256;
        let n_sample = self.ask(&words(SAMPLE, seed ^ 0x5a5a), 1)?.n_prompt.max(1);
        Ok(words(n * SAMPLE / n_sample, seed))
    }
}

/// Words of a prompt; every tokenizer has most of them whole.
const WORDS: [&str; 32] = [
    "river", "stone", "window", "paper", "engine", "garden", "winter", "music", "bridge", "letter",
    "ocean", "market", "silver", "forest", "kitchen", "doctor", "planet", "summer", "mirror",
    "ticket", "circle", "harbor", "camera", "island", "pencil", "valley", "rocket", "butter",
    "castle", "signal", "thread", "wagon",
];

/// `n` words in an order that the seed chooses.
pub fn words(n: usize, seed: u64) -> String {
    let mut noise = Noise::new(seed.wrapping_add(1));
    let word = |word: u64| WORDS[(word >> 40) as usize % WORDS.len()];
    (0..n).map(|_| word(noise.word())).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_differ_by_their_seeds() {
        assert_eq!(words(64, 1).split(' ').count(), 64);
        assert_eq!(words(64, 1), words(64, 1));
        assert_ne!(words(64, 1), words(64, 2));
    }

    #[test]
    fn both_dialects_say_when_they_end() {
        let asked = |dialect| Asked {
            is_fresh: false,
            address: Address::Tcp(String::new()),
            dialect,
            model: String::new(),
        };
        let mut answer = Answer::default();
        let begin = Instant::now();
        let event = json!({ "response": "a", "done": false });
        assert_eq!(asked(Dialect::Ollama).take(&event, begin, &mut answer), Ok(false));
        let event =
            json!({ "response": "", "done": true, "eval_count": 3, "prompt_eval_count": 7 });
        assert_eq!(asked(Dialect::Ollama).take(&event, begin, &mut answer), Ok(true));
        assert_eq!((answer.text.as_str(), answer.n_tokens, answer.n_prompt), ("a", 3, 7));
        let event = json!({ "content": "b", "stop": true, "tokens_predicted": 5 });
        assert_eq!(asked(Dialect::Llama).take(&event, begin, &mut answer), Ok(true));
        assert_eq!((answer.text.as_str(), answer.n_tokens), ("ab", 5));
        let refused = asked(Dialect::Ollama).take(&json!({ "error": "no" }), begin, &mut answer);
        assert!(refused.is_err_and(|words| words.contains("no")));
    }
}
