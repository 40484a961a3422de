//! How much a home may have, and what goes first where it may not have more: the model that costs
//! most for the longest time without use.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use v4_proto::{Digest, ModelName};

use crate::{Role, Store, StoreError, blob, fs, lease, limits};

/// How much a home may have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quota {
    /// Bytes of all blobs and partials; `None` is as much as the disk has.
    pub bytes: Option<u64>,
    /// Models are removed where more is needed. Otherwise that is refused.
    pub evicts: bool,
}

/// Something that is about to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// The key of its partial.
    pub key: String,
    /// Bytes it will have.
    pub size: u64,
}

/// Room that was made for somebody who writes. It is theirs until this is dropped: nobody else is
/// given it meanwhile.
#[derive(Debug)]
#[must_use = "room that is dropped is given to somebody else"]
pub struct Room {
    claims: lease::Shared,
    number: u64,
    /// The names that were removed for it.
    pub gone: Vec<ModelName>,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.claims.lock().rooms.remove(&self.number);
    }
}

/// The file in the home that lists the pinned names, a line each.
const PINS: &str = "pins";

/// A model that may have to go.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    name: ModelName,
    blobs: Vec<(Digest, u64)>,
    /// Time since it was last used or made.
    idle: Duration,
    /// It is pinned, or in use at this moment.
    stays: bool,
}

/// The names to remove, in order, so that at least `needed` bytes come free; `None` where all that
/// may go are too few. The one that goes first has most bytes of its own times seconds without use.
fn choose(candidates: &[Candidate], needed: u64) -> Option<Vec<ModelName>> {
    let mut users: BTreeMap<Digest, usize> = BTreeMap::new();
    for (digest, _) in candidates.iter().flat_map(|one| &one.blobs) {
        *users.entry(*digest).or_default() += 1;
    }
    let mut left: Vec<&Candidate> = candidates.iter().filter(|one| !one.stays).collect();
    let (mut freed, mut chosen) = (0_u64, Vec::new());
    while freed < needed {
        let own = |one: &Candidate| -> u64 {
            let alone = one.blobs.iter().filter(|(digest, _)| users.get(digest) == Some(&1));
            alone.map(|(_, len)| len).sum()
        };
        let cost = |one: &Candidate| {
            let (own, idle) = (own(one), u128::from(one.idle.as_secs()));
            let all: u64 = one.blobs.iter().map(|(_, len)| len).sum();
            // Two names of one model own nothing alone; then the first to go is that which was used
            // longest ago.
            (u128::from(own) * idle, own, u128::from(all) * idle)
        };
        let at = (0..left.len()).max_by_key(|&at| cost(left[at]))?;
        let one = left.swap_remove(at);
        freed = freed.saturating_add(own(one));
        for (digest, _) in &one.blobs {
            users.entry(*digest).and_modify(|n| *n -= 1);
        }
        chosen.push(one.name.clone());
    }
    Some(chosen)
}

impl Store {
    /// Sets how much this home may have, from now on.
    pub fn set_quota(&self, quota: Quota) {
        *self.quota.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = quota;
    }

    /// Makes sure that these may be written, by the disk and by the quota, beside all that others
    /// were given room for. What is deleted or needed by nobody goes where that helps, then models
    /// where the quota says so.
    ///
    /// # Errors
    /// [`StoreError::Space`] or [`StoreError::Quota`], with nothing but garbage removed;
    /// [`StoreError::Io`].
    pub fn make_room(&self, needs: Vec<Need>) -> Result<Room, StoreError> {
        // Held to the end: who comes meanwhile finds this room taken.
        let quota = self.quota.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (needed, taken) = self.wanted(&needs)?;
        let look = || -> Result<(u64, u64), StoreError> {
            let left = match quota.bytes {
                Some(bytes) => bytes.saturating_sub(self.usage()?.total_bytes),
                None => u64::MAX,
            };
            Ok((self.free_bytes()?.saturating_sub(taken), left.saturating_sub(taken)))
        };
        let (mut free, mut left) = look()?;
        if needed > free.min(left) {
            self.prune(false)?;
            (free, left) = look()?;
        }
        if needed > free {
            return Err(StoreError::Space { needed, free });
        }
        let gone = match quota.bytes {
            Some(_) if needed > left => self.evict(needed, left, *quota)?,
            _ => Vec::new(),
        };
        let mut claims = self.tree.claims.lock();
        let number = claims.next_room;
        claims.next_room += 1;
        claims.rooms.insert(number, needs);
        drop(claims);
        Ok(Room { claims: self.tree.claims.clone(), number, gone })
    }

    /// Bytes that these still need, and that others do who were given room.
    fn wanted(&self, needs: &[Need]) -> Result<(u64, u64), StoreError> {
        let claims = self.tree.claims.lock();
        let rooms: Vec<Need> = claims.rooms.values().flatten().cloned().collect();
        drop(claims);
        let mut seen = BTreeSet::new();
        let mut sum = |needs: &[Need], is_ours: bool| -> Result<u64, StoreError> {
            let mut sum = 0_u64;
            for need in needs.iter().filter(|need| seen.insert(need.key.clone())) {
                // A blob that is to be written again is damaged; one of somebody else is done.
                if is_ours || !self.is_done(need)? {
                    let here = self.partial_bytes(&need.key)?;
                    sum = sum.saturating_add(need.size.saturating_sub(here));
                }
            }
            Ok(sum)
        };
        // Ours first: what somebody else brings as well is counted once.
        Ok((sum(needs, true)?, sum(&rooms, false)?))
    }

    /// Whether something that was to be written is a blob by now.
    fn is_done(&self, need: &Need) -> Result<bool, StoreError> {
        let Ok(digest) = need.key.parse::<Digest>() else { return Ok(false) };
        let path = self.tree.blob_path(&digest);
        let meta = self.tree.fs.meta(&path).map_err(StoreError::io("look at", &path))?;
        Ok(meta.is_some_and(|meta| meta.len == need.size))
    }

    /// Removes models so that `needed` bytes fit where `left` are, or says what would.
    fn evict(&self, needed: u64, left: u64, quota: Quota) -> Result<Vec<ModelName>, StoreError> {
        let bytes = quota.bytes.unwrap_or(u64::MAX);
        let refused = |advice: String| StoreError::Quota { needed, left, quota: bytes, advice };
        let Some(chosen) = choose(&self.candidates()?, needed - left) else {
            let advice = "removing everything that is neither pinned nor in use would not be \
                          enough; give the home more with V4_QUOTA";
            return Err(refused(advice.to_owned()));
        };
        if !quota.evicts {
            let names: Vec<String> = chosen.iter().map(ToString::to_string).collect();
            return Err(refused(format!(
                "`v4 rm {}` and `v4 prune` would make room, or set V4_QUOTA_EVICT=on to have the \
                 least valuable removed",
                names.join(" ")
            )));
        }
        for name in &chosen {
            self.remove(name)?;
        }
        Ok(chosen)
    }

    /// The models of this home as they may have to go.
    fn candidates(&self) -> Result<Vec<Candidate>, StoreError> {
        let tree = &self.tree;
        let (pins, now) = (self.pins()?, SystemTime::now());
        let own: BTreeMap<Digest, u64> = tree.blobs()?.into_iter().collect();
        let mut candidates = Vec::new();
        for name in tree.names_below(&self.home().join("manifests"))? {
            let record = match tree.read_record(&name) {
                Ok(Some(record)) => record,
                Ok(None) | Err(StoreError::Manifest { .. }) => continue,
                Err(error) => return Err(error),
            };
            let claims = tree.claims.lock();
            let is_used =
                record.manifest.role(Role::Model).any(|layer| claims.is_leased(&layer.digest));
            drop(claims);
            let mut digests = record.manifest.digests();
            digests.sort();
            digests.dedup();
            let blob = |digest: Digest| Some((digest, *own.get(&digest)?));
            let used = self.last_use(&name).map_or(record.modified, |at| at.max(record.modified));
            candidates.push(Candidate {
                blobs: digests.into_iter().filter_map(blob).collect(),
                idle: now.duration_since(used).unwrap_or_default(),
                stays: is_used || pins.iter().any(|pin| pin.matches(&name)),
                name,
            });
        }
        Ok(candidates)
    }

    /// The names that no quota removes.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn pins(&self) -> Result<Vec<ModelName>, StoreError> {
        let path = self.home().join(PINS);
        if self.tree.fs.meta(&path).map_err(StoreError::io("look at", &path))?.is_none() {
            return Ok(Vec::new());
        }
        let bytes = fs::read(self.tree.fs.as_ref(), &path, limits::ROOTS_BYTES);
        let bytes = bytes.map_err(StoreError::io("read", &path))?;
        let text = String::from_utf8_lossy(&bytes);
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Pins a name, or takes the pin away. Returns whether that changed anything.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`] or [`StoreError::Io`].
    pub fn pin(&self, name: &ModelName, is_pinned: bool) -> Result<bool, StoreError> {
        let _change = self.lock_changes()?;
        let mut pins = self.pins()?;
        let was_pinned = pins.iter().any(|pin| pin.matches(name));
        if was_pinned == is_pinned {
            return Ok(false);
        }
        pins.retain(|pin| !pin.matches(name));
        if is_pinned {
            pins.push(name.clone());
        }
        let lines: Vec<String> = pins.iter().map(ToString::to_string).collect();
        let (to, fs) = (self.home().join(PINS), self.tree.fs.as_ref());
        blob::put_file(fs, &self.staging_path(), &to, lines.join("\n").as_bytes(), 0o600)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sha256;

    /// A line of a table: name, blobs by letter (each 100 bytes, in capitals 1,000), days without
    /// use, whether it stays.
    type Line = (&'static str, &'static str, u64, bool);

    /// The models there are, the bytes that are needed, the names that go.
    type Case = (&'static [Line], u64, Option<&'static [&'static str]>);

    fn candidates(lines: &[Line]) -> Vec<Candidate> {
        let blob =
            |c: char| (sha256(c.to_string().as_bytes()), if c.is_uppercase() { 1000 } else { 100 });
        let candidate = |(name, blobs, days, stays): &Line| Candidate {
            name: name.parse().unwrap(),
            blobs: blobs.chars().map(blob).collect(),
            idle: Duration::from_hours(24 * days),
            stays: *stays,
        };
        lines.iter().map(candidate).collect()
    }

    #[test]
    fn what_costs_most_for_longest_goes_first() {
        let table: &[Case] = &[
            // Nothing is needed, nothing goes.
            (&[("a", "A", 9, false)], 0, Some(&[])),
            // Large and old before small, before young.
            (&[("a", "a", 9, false), ("b", "B", 9, false), ("c", "C", 1, false)], 1, Some(&["b"])),
            // 1,000 bytes for 1 day cost more than 100 bytes for 9.
            (&[("a", "a", 9, false), ("c", "C", 1, false)], 1, Some(&["c"])),
            // 100 bytes for 11 days cost more than 1,000 for 1; but they are not enough.
            (&[("a", "a", 11, false), ("c", "C", 1, false)], 100, Some(&["a"])),
            (&[("a", "a", 11, false), ("c", "C", 1, false)], 101, Some(&["a", "c"])),
            // What is pinned or used stays, and then it may not be enough.
            (&[("a", "a", 1, false), ("b", "B", 9, true)], 100, Some(&["a"])),
            (&[("a", "a", 1, false), ("b", "B", 9, true)], 101, None),
            (&[], 1, None),
            // Shared bytes are free only when the last who has them goes.
            (&[("a", "Ax", 9, false), ("b", "Ay", 5, false)], 100, Some(&["a"])),
            (&[("a", "Ax", 9, false), ("b", "Ay", 5, false)], 101, Some(&["a", "b"])),
            (&[("a", "Ax", 9, false), ("b", "Ay", 5, true)], 101, None),
            // Two names of one model: the one unused for longer goes first, then the other.
            (&[("a", "A", 3, false), ("b", "A", 5, false)], 1000, Some(&["b", "a"])),
            // What was used this second costs nothing yet, but goes before a refusal.
            (&[("a", "A", 0, false)], 1, Some(&["a"])),
            (&[("a", "A", 0, false), ("b", "b", 0, false)], 1, Some(&["a"])),
        ];
        for (i, (lines, needed, expected)) in table.iter().enumerate() {
            let chosen = choose(&candidates(lines), *needed);
            let names = chosen.map(|names| names.iter().map(|n| n.model().to_owned()).collect());
            let expected: Option<Vec<String>> =
                expected.map(|names| names.iter().map(|&name| name.to_owned()).collect());
            assert_eq!(names, expected, "line {i}");
        }
    }
}
