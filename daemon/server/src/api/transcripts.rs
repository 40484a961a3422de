//! Plays the transcripts of `tests/golden/api`: one request and its answer each, byte for byte.

use jiff::Timestamp;
use v4_proto::{Delta, Event};

use crate::{
    api::{Encode, ollama, openai},
    ops::generate::{End, Settled},
};

macro_rules! transcripts {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../../../tests/golden/api/", $name, ".txt")))),*]
    };
}

const TRANSCRIPTS: [(&str, &str); 15] = transcripts![
    "ollama/generate-stream",
    "ollama/generate-whole",
    "ollama/generate-failed",
    "ollama/generate-load",
    "ollama/chat-stream",
    "ollama/chat-whole",
    "ollama/chat-unload",
    "openai/chat-stream",
    "openai/chat-tools",
    "openai/chat-whole",
    "openai/chat-failed",
    "openai/chat-silent",
    "openai/completions-stream",
    "openai/completions-whole",
    "openai/completions-failed",
];

/// Title and text of each part of a transcript.
fn parts(transcript: &str) -> Vec<(&str, &str)> {
    let parts = transcript.split("--- ").skip(1);
    parts.map(|part| part.split_once('\n').expect("a title and a text")).collect()
}

/// What the client reads, with the content type it comes under.
fn play(path: &str, body: &str, events: (&str, &str)) -> (String, String) {
    let now = Timestamp::new(1_700_000_000, 500_000_000).expect("in range");
    let (mut encoder, stream, json_type): (Box<dyn Encode>, bool, &str) = match path {
        "/v1/chat/completions" => {
            let request = openai::decode::chat(body.as_bytes(), 7, now.as_second()).expect(body);
            (Box::new(request.encoder), request.stream, openai::JSON_TYPE)
        }
        "/v1/completions" => {
            let request = openai::completions::decode(body.as_bytes(), 7, now.as_second());
            let request = request.expect(body);
            (Box::new(request.encoder), request.stream, openai::JSON_TYPE)
        }
        path => {
            let decode = match path {
                "/api/chat" => ollama::decode::chat,
                "/api/generate" => ollama::decode::generate,
                other => panic!("no such path: {other}"),
            };
            let request = decode(body.as_bytes()).expect(body);
            (Box::new(request.encoder), request.stream, ollama::JSON_TYPE)
        }
    };
    if events.0 == "settled" {
        let settled = match events.1.trim() {
            "loaded" => Settled::Loaded,
            _ => Settled::Unloaded,
        };
        return (json_type.to_owned(), text(encoder.settled(settled, now)));
    }
    let (mut all, mut streamed, mut whole) = (Delta::default(), Vec::new(), Vec::new());
    for event in events.1.lines() {
        match serde_json::from_str(event).expect(event) {
            Event::Delta(delta) => {
                all.text.push_str(&delta.text);
                all.thinking.push_str(&delta.thinking);
                all.tool_calls.extend(delta.tool_calls.clone());
                if stream {
                    streamed.extend(encoder.delta(delta, now));
                }
            }
            Event::Done(done) => {
                let end = End { done, load_ns: 5, total_ns: 100 };
                if stream {
                    streamed.extend(encoder.end(&end, now));
                } else {
                    whole = encoder.whole(all.clone(), &end, now);
                }
            }
            Event::Failed(fault) => streamed.extend(encoder.failed(&fault)),
        }
    }
    if stream {
        (encoder.stream_type().to_owned(), text(streamed))
    } else {
        (json_type.to_owned(), text(whole))
    }
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).expect("UTF-8")
}

#[test]
fn every_transcript_plays_as_it_is_written() {
    for (name, transcript) in TRANSCRIPTS {
        let parts = parts(transcript);
        let [(request, body), events, (content_type, answer)] = parts[..] else {
            panic!("{name} has {} parts", parts.len())
        };
        let path = request.strip_prefix("POST ").expect("a POST");
        let (played_type, mut played) = play(path, body, events);
        if !played.ends_with('\n') {
            played.push('\n');
        }
        assert_eq!(played, answer, "{name}");
        assert_eq!(played_type, content_type, "{name}");
    }
}
