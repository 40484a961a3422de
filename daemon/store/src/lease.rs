//! What may not be deleted: blobs that somebody uses, and partials that somebody writes.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use v4_proto::Digest;

use crate::{gc::Tree, quota::Need};

/// Who uses what. Garbage is collected under this lock, so a lease that was given is safe.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    leased: HashMap<Digest, usize>,
    partials: HashSet<String>,
    /// What those who write were given room for, by their number.
    pub rooms: HashMap<u64, Vec<Need>>,
    /// The number of the next one.
    pub next_room: u64,
    /// Blobs that should have been collected but were leased, or could not be deleted.
    pub doomed: BTreeSet<Digest>,
}

impl Claims {
    /// Whether somebody uses this blob.
    pub fn is_leased(&self, digest: &Digest) -> bool {
        self.leased.contains_key(digest)
    }

    /// Whether somebody writes a partial.
    pub fn is_written(&self) -> bool {
        !self.partials.is_empty()
    }
}

/// [`Claims`], shared with the leases that are out.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shared(Arc<Mutex<Claims>>);

impl Shared {
    /// The claims. A panic elsewhere leaves counters that are still true.
    pub fn lock(&self) -> MutexGuard<'_, Claims> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the right to write a partial, unless somebody has it.
    pub fn claim(&self, key: &str) -> Option<Claim> {
        let is_free = self.lock().partials.insert(key.to_owned());
        is_free.then(|| Claim { shared: self.clone(), key: key.to_owned() })
    }
}

/// Blobs that stay while this lives, whatever is removed.
#[derive(Debug)]
#[must_use = "a lease that is dropped protects nothing"]
pub struct Lease {
    shared: Shared,
    /// Weak: a lease that outlives its store keeps no home locked.
    tree: Weak<Tree>,
    digests: Vec<Digest>,
}

impl Lease {
    /// Takes a lease on these blobs.
    pub(crate) fn new(tree: &Arc<Tree>, digests: &[Digest]) -> Self {
        let mut claims = tree.claims.lock();
        for digest in digests {
            *claims.leased.entry(*digest).or_default() += 1;
        }
        drop(claims);
        Self { shared: tree.claims.clone(), tree: Arc::downgrade(tree), digests: digests.to_vec() }
    }

    /// Gives it back. Returns whether that leaves a blob that should have been collected before.
    fn end(&self) -> bool {
        let mut claims = self.shared.lock();
        let mut is_doomed = false;
        for digest in &self.digests {
            if let Some(count) = claims.leased.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    claims.leased.remove(digest);
                    is_doomed |= claims.doomed.contains(digest);
                }
            }
        }
        is_doomed
    }
}

impl Drop for Lease {
    /// Collects what the last lease on it kept. Only then does this touch the disk, to remove
    /// files; no lease is dropped while the store itself holds its lock on changes.
    fn drop(&mut self) {
        if !self.end() {
            return;
        }
        if let Some(tree) = self.tree.upgrade() {
            let _change = tree.change.lock().unwrap_or_else(PoisonError::into_inner);
            // What cannot be deleted stays doomed for the next collection.
            let _ = tree.collect(&[]);
        }
    }
}

/// The right to write one partial.
#[derive(Debug)]
pub(crate) struct Claim {
    shared: Shared,
    key: String,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.shared.lock().partials.remove(&self.key);
    }
}
