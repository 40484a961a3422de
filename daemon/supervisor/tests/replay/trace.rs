//! The text of a trace.

use std::{collections::BTreeMap, time::Duration};

pub struct Model {
    pub mib: u64,
    pub load: Duration,
}

pub enum When {
    At(Duration),
    /// After the caller's last answer.
    After(Duration),
}

pub struct Ask {
    pub when: When,
    pub caller: String,
    pub model: String,
    pub answer: Duration,
}

pub struct Trace {
    pub budget_mib: u64,
    pub models: BTreeMap<String, Model>,
    pub asks: Vec<Ask>,
}

impl Trace {
    pub fn parse(text: &str) -> Self {
        let mut trace = Self { budget_mib: 0, models: BTreeMap::new(), asks: Vec::new() };
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["budget", mib] => trace.budget_mib = mib.parse().expect("MiB"),
                ["model", name, mib, load] => {
                    let model = Model { mib: mib.parse().expect("MiB"), load: seconds(load) };
                    trace.models.insert(name.to_owned(), model);
                }
                [when, caller, model, answer] => trace.asks.push(Ask {
                    when: match when.strip_prefix('+') {
                        Some(gap) => When::After(seconds(gap)),
                        None => When::At(seconds(when)),
                    },
                    caller: caller.to_owned(),
                    model: model.to_owned(),
                    answer: seconds(answer),
                }),
                _ => panic!("{line:?} is no line of a trace"),
            }
        }
        assert!(trace.asks.iter().all(|ask| trace.models.contains_key(&ask.model)));
        trace
    }

    /// How many models a person would allow who knows only their number: so many of the largest fit
    /// at the same time.
    pub fn fit_together(&self) -> usize {
        let mut sizes: Vec<u64> = self.models.values().map(|model| model.mib).collect();
        sizes.sort_unstable();
        let sums = sizes.iter().rev().scan(0, |sum, mib| {
            *sum += mib;
            Some(*sum)
        });
        sums.take_while(|sum| *sum <= self.budget_mib).count().max(1)
    }
}

fn seconds(text: &str) -> Duration {
    Duration::from_secs_f64(text.parse().expect("seconds"))
}
