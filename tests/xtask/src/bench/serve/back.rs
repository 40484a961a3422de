//! The next turn of a long conversation after its model was unloaded, its daemon killed, its daemon
//! restarted, beside computing it again.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::json;
use v4_tests::daemon::Daemon;
use v4_tests::home::Home;

use super::Args;
use super::ask::{Answer, Asked, words};
use super::server::{import, kept_home, start};

/// Tokens of an answer.
const TOKENS: usize = 16;
/// Tokens of context beyond the first prompt's.
const MORE: usize = 4096;
/// Without a change for so long, the state of a conversation is on disk.
const QUIET: Duration = Duration::from_secs(2);
/// What writing it may take.
const WRITING: Duration = Duration::from_secs(30);

/// What comes between two turns.
#[derive(Debug, Clone, Copy)]
enum Between {
    Unload,
    Kill,
    Restart,
}

/// Measures ours.
///
/// # Errors
/// A sentence.
pub fn run(args: &Args) -> Result<(), String> {
    let home = kept_home();
    let settings = [
        ("V4_THREADS", args.threads().to_string()),
        ("V4_KEEP_ALIVE", "-1".to_owned()),
        ("V4_CONTEXT", (args.long + MORE).to_string()),
        ("V4_SLOTS", "1".to_owned()),
    ];
    let mut daemon = start(home, &settings);
    let mut asked = import(&daemon.tcp, &args.files[0], "one")?;
    asked.ask("hello", 1)?;
    let mut conversation = asked.prompt_of(args.long, 60)?;
    let computed = turn(&asked, &mut conversation)?;
    for between in [Between::Unload, Between::Kill, Between::Restart] {
        settled(home)?;
        match between {
            Between::Unload => {
                let body = json!({ "model": "one", "keep_alive": 0 });
                daemon.generate(&body);
                v4_tests::process::until("the unload", || daemon.loaded().is_empty().then_some(()));
            }
            Between::Kill => {
                daemon.kill();
                daemon = start(home, &settings);
            }
            Between::Restart => {
                daemon.stop();
                daemon = start(home, &settings);
            }
        }
        asked = Asked { address: daemon.tcp.clone(), ..asked };
        let answer = turn(&asked, &mut conversation)?;
        say(args, between, &computed, &answer);
    }
    drop::<Daemon>(daemon);
    Ok(())
}

fn say(args: &Args, between: Between, computed: &Answer, answer: &Answer) {
    let (whole, back) = (computed.first(), answer.first());
    let n_tokens = answer.n_prompt;
    args.say(
        &format!(
            "return   v4         to {n_tokens} tokens after {between:?}: first token {back:.2} s, \
             {:.1} % of the {whole:.1} s of computing",
            100.0 * back / whole,
        ),
        &json!({
            "part": "return", "engine": "v4", "after": format!("{between:?}").to_lowercase(),
            "tokens": n_tokens, "first_token_s": back, "computing_s": whole,
        }),
    );
}

/// One turn; the conversation then has its answer and a next question.
fn turn(asked: &Asked, conversation: &mut String) -> Result<Answer, String> {
    let answer = asked.ask(conversation, TOKENS)?;
    *conversation += &answer.text;
    *conversation += " ";
    *conversation += &words(TOKENS, conversation.len() as u64);
    Ok(answer)
}

/// Waits until the state on disk no longer changes.
fn settled(home: &Home) -> Result<(), String> {
    let end = Instant::now() + WRITING;
    let mut last = (bytes(&home.path().join("kv")), Instant::now());
    while last.1.elapsed() < QUIET {
        if Instant::now() > end {
            return Err("the state of a conversation is not on disk after 30 s".to_owned());
        }
        std::thread::park_timeout(Duration::from_millis(50));
        let now = bytes(&home.path().join("kv"));
        if now != last.0 {
            last = (now, Instant::now());
        }
    }
    Ok(())
}

/// Bytes of all files below a folder.
fn bytes(folder: &std::path::Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => bytes(&entry.path()),
        Ok(meta) => meta.len(),
        // It was removed since.
        Err(_) => 0,
    };
    entries.filter_map(Result::ok).map(size).sum()
}
