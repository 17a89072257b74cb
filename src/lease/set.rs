//! All leases at one point in time, as views carry them.

use std::sync::Arc;

use imbl::{OrdMap, OrdSet};

/// The leases and their keys. Persistent: a clone is a snapshot and costs one pointer; a change to an unshared set
/// happens in place, to a shared one it copies a path of nodes.
#[derive(Clone, Debug, Default)]
pub struct LeaseSet {
    leases: OrdMap<i64, Lease>,
}

#[derive(Clone, Debug)]
struct Lease {
    ttl: i64,
    /// Seconds left at the newest checkpoint; 0: no checkpoint since the grant or the last renewal.
    remaining: i64,
    keys: Keys,
}

/// Most leases hold one key, and then need no tree.
#[derive(Clone, Debug)]
enum Keys {
    None,
    One(Arc<[u8]>),
    Many(OrdSet<Arc<[u8]>>),
}

impl LeaseSet {
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    pub fn contains(&self, id: i64) -> bool {
        self.leases.contains_key(&id)
    }

    /// The granted time to live in seconds.
    pub fn ttl(&self, id: i64) -> Option<i64> {
        self.leases.get(&id).map(|lease| lease.ttl)
    }

    /// Seconds left at the newest checkpoint; 0 without one. `None`: no such lease.
    pub fn checkpoint(&self, id: i64) -> Option<i64> {
        self.leases.get(&id).map(|lease| lease.remaining)
    }

    /// The keys attached to `id`, ascending; none for an unknown lease.
    pub fn keys(&self, id: i64) -> impl Iterator<Item = &[u8]> {
        let (one, many) = match self.leases.get(&id).map(|lease| &lease.keys) {
            None | Some(Keys::None) => (None, None),
            Some(Keys::One(key)) => (Some(&**key), None),
            Some(Keys::Many(keys)) => (None, Some(keys)),
        };
        one.into_iter().chain(many.into_iter().flatten().map(|key| &**key))
    }

    /// All ids, ascending.
    pub fn ids(&self) -> impl Iterator<Item = i64> {
        self.leases.keys().copied()
    }

    /// Id, time to live and checkpoint (0: none) of each lease, by ascending id.
    pub fn iter(&self) -> impl Iterator<Item = (i64, i64, i64)> {
        self.leases.iter().map(|(id, lease)| (*id, lease.ttl, lease.remaining))
    }

    pub(super) fn insert(&mut self, id: i64, ttl: i64, remaining: i64) {
        self.leases.insert(id, Lease { ttl, remaining, keys: Keys::None });
    }

    /// Takes the lease out; its keys, ascending.
    pub(super) fn remove(&mut self, id: i64) -> Option<Vec<Arc<[u8]>>> {
        Some(match self.leases.remove(&id)?.keys {
            Keys::None => Vec::new(),
            Keys::One(key) => vec![key],
            Keys::Many(keys) => keys.iter().cloned().collect(),
        })
    }

    pub(super) fn set_checkpoint(&mut self, id: i64, remaining: i64) {
        self.leases.get_mut(&id).expect("the caller looked it up").remaining = remaining;
    }

    /// False: no such lease.
    pub(super) fn attach(&mut self, id: i64, key: Arc<[u8]>) -> bool {
        let Some(lease) = self.leases.get_mut(&id) else { return false };
        match &mut lease.keys {
            Keys::None => lease.keys = Keys::One(key),
            Keys::One(one) => {
                let one = Arc::clone(one);
                lease.keys = Keys::Many([one, key].into_iter().collect());
            }
            Keys::Many(keys) => {
                keys.insert(key);
            }
        }
        true
    }

    pub(super) fn detach(&mut self, id: i64, key: &[u8]) {
        let lease = self.leases.get_mut(&id).expect("keys are attached to leases that exist");
        match &mut lease.keys {
            Keys::None => {}
            Keys::One(_) => lease.keys = Keys::None,
            Keys::Many(keys) => {
                keys.remove(key);
                if keys.len() == 1 {
                    let last = keys.get_min().expect("its length is 1");
                    lease.keys = Keys::One(Arc::clone(last));
                }
            }
        }
    }
}
