//! A large file from several places at once, and who of them lies.
//!
//! What came from whom is remembered. When the whole is not what its digest says, a chain (ours, or
//! a peer's) tells which parts are wrong, and those alone are asked of the others. Without one,
//! what the smallest helper brought is asked of the others; whoever brought a wrong whole alone is
//! asked no more. Each round leaves fewer to doubt, so as long as one place is honest, the file
//! comes.

use std::{ops::Range, sync::Arc};

use v4_proto::Digest;
use v4_store::{Chain, Partial, Ranges, StoreError};

use crate::{
    error::PullError,
    fetch::{Fetcher, discard_empty},
    recipe::{Location, Part},
    source::{
        Target, peer,
        ranges::{self, Mirror},
    },
    write::{Meter, Sink, Turn, Writer, blocking},
};

/// What is fetched, and where it goes.
pub(crate) struct Job<'a> {
    pub fetcher: &'a Fetcher,
    pub digest: Digest,
    pub size: u64,
    pub key: &'a str,
    pub turn: &'a Turn,
    pub meter: &'a Meter<'a>,
}

/// Who has the file.
#[derive(Debug)]
struct Member {
    location: Location,
    trust: Trust,
    brought: Ranges,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trust {
    /// It is asked.
    Asked,
    /// What it brought may be wrong. It is asked again when another one is found guilty.
    Doubted,
    /// It brought a wrong file alone, or is of no use.
    Out,
}

/// All who have the file, and what of it is whose.
#[derive(Debug)]
struct Team {
    members: Vec<Member>,
    /// What was here before: whose, nobody knows.
    before: Ranges,
    chain: Option<Chain>,
    has_asked_for_chain: bool,
}

/// Fetches the file from all these places together and makes it a blob.
pub(crate) async fn fetch(job: &Job<'_>, places: Vec<Location>) -> Result<(), PullError> {
    let Job { fetcher, digest, size, .. } = *job;
    let mut writer = Writer::open(&fetcher.store, job.key, Some(size), job.turn).await?;
    let mut team = Team::new(places, writer.ranges());
    loop {
        let mut partial = match round(job, &mut team, writer).await {
            Ok(partial) => partial,
            Err(error) if !error.is_ours() && team.turn_to_the_doubted() => {
                let (store, size) = (&fetcher.store, Some(size));
                writer = Writer::open(store, job.key, size, job.turn).await?;
                continue;
            }
            Err(error) => return Err(error),
        };
        let (actual, kept) = blocking(move || Ok((partial.digest()?, partial))).await?;
        partial = kept;
        if actual == digest {
            return commit(job, partial).await;
        }
        team.ask_for_chain(job).await?;
        let chain = team.chain.clone();
        let (wrong, kept) = blocking(move || {
            let wrong =
                chain.map(|chain| partial.wrong_parts(&chain, &digest, size)).transpose()?;
            Ok((wrong, partial))
        })
        .await?;
        partial = kept;
        let last = team.last();
        let Some(gone) = team.judge(wrong.as_deref(), size) else {
            let source = StoreError::Digest { expected: digest, actual };
            let turn = Arc::clone(job.turn);
            blocking(move || partial.discard().map(|()| drop(turn))).await?;
            return Err(PullError::from(source).at(&last, false));
        };
        let turn = Arc::clone(job.turn);
        let forgot = blocking(move || {
            partial.forget(&gone)?;
            drop(turn);
            Ok(partial)
        });
        writer = Writer::again(forgot.await?, size, job.turn);
    }
}

/// Has everything brought by those who are asked.
async fn round(job: &Job<'_>, team: &mut Team, writer: Writer) -> Result<Partial, PullError> {
    let Job { fetcher, size, .. } = *job;
    let net = &fetcher.net;
    let asked: Vec<usize> = team.asked();
    let target = |i: &usize| Target::of(net, &team.members[*i].location.parts()[0]);
    let targets: Vec<Target> = asked.iter().filter_map(target).collect();
    let links: Vec<_> = targets.iter().map(|target| target.link(net)).collect();
    let mirrors: Vec<Mirror<'_>> = links.iter().map(Mirror::new).collect();
    let sink = Sink::new(&writer, 0, job.meter.again());
    let outcome = ranges::read(&mirrors, size, &sink).await;
    for (i, mirror) in asked.iter().zip(&mirrors) {
        let member = &mut team.members[*i];
        for range in mirror.brought().iter() {
            member.brought.add(range);
        }
        if mirror.is_unreachable() {
            net.note_unreachable(&member.location);
        }
        if mirror.is_refusing() {
            job.meter.note_refusal(&member.location);
        }
    }
    // Also after an error: whoever comes next begins when this writer is done.
    let partial = writer.finish().await;
    match (outcome, partial) {
        (Ok(true), Ok(partial)) => Ok(partial),
        (Ok(_) | Err(PullError::Writer), Err(error)) => Err(error),
        (Ok(false), Ok(partial)) => {
            discard_empty(Ok(partial), job.turn).await?;
            Err(links[0].wrong(crate::source::http::OTHER_RANGE))
        }
        (Err(error), partial) => {
            discard_empty(partial, job.turn).await?;
            Err(error)
        }
    }
}

async fn commit(job: &Job<'_>, partial: Partial) -> Result<(), PullError> {
    let Job { digest, size, .. } = *job;
    let (store, turn) = (Arc::clone(&job.fetcher.store), Arc::clone(job.turn));
    blocking(move || {
        partial.commit(&digest, size)?;
        store.note_intact(&digest);
        drop(turn);
        Ok(())
    })
    .await
}

impl Team {
    fn new(places: Vec<Location>, before: Ranges) -> Self {
        let member =
            |location| Member { location, trust: Trust::Asked, brought: Ranges::default() };
        let members = places.into_iter().map(member).collect();
        Self { members, before, chain: None, has_asked_for_chain: false }
    }

    /// The numbers of those who are asked.
    fn asked(&self) -> Vec<usize> {
        let is_asked = |i: &usize| self.members[*i].trust == Trust::Asked;
        (0..self.members.len()).filter(is_asked).collect()
    }

    /// One who brought something, for the message about bytes that nobody could mend.
    fn last(&self) -> String {
        let brought = |member: &&Member| member.brought.total() > 0;
        let member = self.members.iter().find(brought).or(self.members.first());
        member.map_or_else(String::new, |member| member.location.to_string())
    }

    /// Finds out what the parts must be, once: ours is the best, a peer's the next.
    async fn ask_for_chain(&mut self, job: &Job<'_>) -> Result<(), PullError> {
        if std::mem::replace(&mut self.has_asked_for_chain, true) {
            return Ok(());
        }
        let Job { fetcher, digest, size, .. } = *job;
        let store = Arc::clone(&fetcher.store);
        self.chain = blocking(move || store.chain(&digest, size)).await?;
        for member in &self.members {
            if let (None, [Part::Peer(blob)]) = (&self.chain, member.location.parts()) {
                self.chain = peer::chain(&fetcher.net, blob, size).await;
            }
        }
        Ok(())
    }

    /// What is to be forgotten of a file of `size` bytes that is wrong, given the parts that a
    /// chain says are wrong; `None` when nobody is left who could bring it right.
    fn judge(&mut self, wrong: Option<&[Range<u64>]>, size: u64) -> Option<Vec<Range<u64>>> {
        let n_doubted = self.n(Trust::Doubted);
        let had_before = self.before.total() > 0;
        let gone = match wrong {
            Some(wrong) if !wrong.is_empty() => {
                self.doubt_parts(wrong);
                // A chain that brings no new doubt is a lie itself, or what it says is mended.
                if self.n(Trust::Doubted) == n_doubted && !had_before {
                    self.chain = None;
                    self.doubt_helper(size)
                } else {
                    wrong.to_vec()
                }
            }
            _ => self.doubt_helper(size),
        };
        if self.asked().is_empty() {
            // All of them have their last chance; after that the chain is not believed.
            self.chain = None;
            self.clear_doubts();
        }
        for range in &gone {
            self.before.remove(range.clone());
            self.members.iter_mut().for_each(|member| member.brought.remove(range.clone()));
        }
        (!self.asked().is_empty()).then_some(gone)
    }

    fn n(&self, trust: Trust) -> usize {
        self.members.iter().filter(|member| member.trust == trust).count()
    }

    /// When those who are asked failed: asks those who were doubted. Returns whether there are any.
    fn turn_to_the_doubted(&mut self) -> bool {
        if self.n(Trust::Doubted) == 0 {
            return false;
        }
        let asked = self.members.iter_mut().filter(|member| member.trust == Trust::Asked);
        asked.for_each(|member| member.trust = Trust::Out);
        self.clear_doubts();
        true
    }

    fn clear_doubts(&mut self) {
        let doubted = self.members.iter_mut().filter(|member| member.trust == Trust::Doubted);
        doubted.for_each(|member| member.trust = Trust::Asked);
    }

    /// Doubts whoever brought one of these parts alone; where nobody did, whoever brought some.
    fn doubt_parts(&mut self, wrong: &[Range<u64>]) {
        let had_some = |brought: &Ranges, part: &Range<u64>| brought.has_any(part.clone());
        let helpers = |part: &Range<u64>| -> Vec<usize> {
            let has_helped = |i: &usize| had_some(&self.members[*i].brought, part);
            (0..self.members.len()).filter(has_helped).collect()
        };
        let (mut alone, mut all) = (Vec::new(), Vec::new());
        for part in wrong {
            match helpers(part)[..] {
                [one] if !had_some(&self.before, part) => alone.push(one),
                ref some => all.extend_from_slice(some),
            }
        }
        for i in if alone.is_empty() { all } else { alone } {
            let member = &mut self.members[i];
            if member.trust == Trust::Asked {
                member.trust = Trust::Doubted;
            }
        }
    }

    /// Without a chain: doubts what was here before, then whoever brought least; whoever brought
    /// all of it is guilty.
    fn doubt_helper(&mut self, size: u64) -> Vec<Range<u64>> {
        if self.before.total() > 0 {
            return self.before.iter().collect();
        }
        let helpers = self.members.iter_mut().filter(|member| member.brought.total() > 0);
        let Some(least) = helpers.min_by_key(|member| member.brought.total()) else {
            return std::iter::once(0..size).collect();
        };
        if least.brought.total() < size {
            least.trust = Trust::Doubted;
            return least.brought.iter().collect();
        }
        least.trust = Trust::Out;
        self.clear_doubts();
        std::iter::once(0..size).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: u64 = 8 << 20;

    /// A team of those who brought a part each.
    fn team(brought: &[(u64, u64)]) -> Team {
        let place = |i: usize| format!("http://host{i}/f").parse().unwrap();
        let mut team = Team::new((0..brought.len()).map(place).collect(), Ranges::default());
        for (member, (start, end)) in team.members.iter_mut().zip(brought) {
            member.brought.add(*start..*end);
        }
        team
    }

    /// What is to be forgotten, as pairs; nothing where nobody is left.
    fn judge(team: &mut Team, wrong: Option<(u64, u64)>, size: u64) -> Vec<(u64, u64)> {
        let wrong: Option<Vec<Range<u64>>> = wrong.map(|(start, end)| vec![start..end; 1]);
        let gone = team.judge(wrong.as_deref(), size).unwrap_or_default();
        gone.into_iter().map(|range| (range.start, range.end)).collect()
    }

    fn trusts(team: &Team) -> Vec<Trust> {
        team.members.iter().map(|member| member.trust).collect()
    }

    #[test]
    fn a_chain_leads_to_the_liar_and_its_wrong_part_alone() {
        let mut team = team(&[(0, PART), (PART, 3 * PART)]);
        team.chain = Some(Chain::default());
        let wrong = (PART, 2 * PART);
        assert_eq!(judge(&mut team, Some(wrong), 3 * PART), [wrong]);
        assert_eq!(trusts(&team), [Trust::Asked, Trust::Doubted]);
        // The other one brings the same again, so the chain was a lie, or this one lies too.
        team.members[0].brought.add(PART..2 * PART);
        assert_eq!(judge(&mut team, Some(wrong), 3 * PART), [wrong]);
        assert_eq!(trusts(&team), [Trust::Asked, Trust::Asked], "somebody must be asked");
        assert_eq!(team.chain, None);
    }

    #[test]
    fn who_shares_a_wrong_part_is_not_doubted_where_another_one_brought_one_alone() {
        let mut team = team(&[(0, PART + 5), (PART + 5, 3 * PART)]);
        let gone = team.judge(Some(&[PART..2 * PART, 2 * PART..3 * PART]), 3 * PART).unwrap();
        assert_eq!(gone.len(), 2);
        assert_eq!(trusts(&team), [Trust::Asked, Trust::Doubted]);
    }

    #[test]
    fn without_a_chain_doubts_end_with_the_honest_one() {
        let mut team = team(&[(0, 4), (4, 6), (6, 10)]);
        assert_eq!(judge(&mut team, None, 10), [(4, 6)]);
        assert_eq!(trusts(&team), [Trust::Asked, Trust::Doubted, Trust::Asked]);
        team.members[2].brought.add(4..6);
        assert_eq!(judge(&mut team, None, 10), [(0, 4)]);
        // Now all is of one, and still wrong: that one is out, and the others are asked again.
        team.members[2].brought.add(0..4);
        assert_eq!(judge(&mut team, None, 10), [(0, 10)]);
        assert_eq!(trusts(&team), [Trust::Asked, Trust::Asked, Trust::Out]);
        team.members[0].brought.add(0..10);
        judge(&mut team, None, 10);
        team.members[1].brought.add(0..10);
        assert_eq!(judge(&mut team, None, 10), []);
    }

    #[test]
    fn what_was_here_before_is_doubted_first() {
        let mut team = team(&[(4, 10)]);
        team.before.add(0..4);
        assert_eq!(judge(&mut team, None, 10), [(0, 4)]);
        assert_eq!(trusts(&team), [Trust::Asked]);
        team.members[0].brought.add(0..4);
        assert_eq!(judge(&mut team, None, 10), []);
    }
}
