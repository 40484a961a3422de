//! What may not be deleted: blobs that somebody uses, and partials that somebody writes.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use v4_proto::Digest;

/// Who uses what. Garbage is collected under this lock, so a lease that was given is safe.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    leased: HashMap<Digest, usize>,
    partials: HashSet<String>,
    /// Blobs that should have been collected but were leased.
    pub doomed: BTreeSet<Digest>,
}

impl Claims {
    /// Whether somebody uses this blob.
    pub fn is_leased(&self, digest: &Digest) -> bool {
        self.leased.contains_key(digest)
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

    /// Takes a lease on these blobs.
    pub fn lease(&self, digests: &[Digest]) -> Lease {
        let mut claims = self.lock();
        for digest in digests {
            *claims.leased.entry(*digest).or_default() += 1;
        }
        drop(claims);
        Lease { shared: self.clone(), digests: digests.to_vec() }
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
    digests: Vec<Digest>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut claims = self.shared.lock();
        for digest in &self.digests {
            if let Some(count) = claims.leased.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    claims.leased.remove(digest);
                }
            }
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
