//! The replicated lease state. Apply owns it; the same entries make the same state on every member.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use super::{LeaseSet, TTL_MAX};
use crate::{
    pb::leasepb,
    sim::HashMap,
    storage::{self, Bucket, Storage, WriteBatch},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the lease's time to live is too large")]
    TtlTooLarge,
    #[error("a lease with this id exists")]
    Exists,
    #[error("no such lease")]
    NotFound,
}

/// Leases and what is attached to them. Which lease holds a key is no row of its own: the newest record of the key
/// says it, and at start [`Leases::restore_attachment`] is called for each such record.
#[derive(Debug, Default)]
pub struct Leases {
    set: LeaseSet,
    /// Invariant: the exact inverse of the keys in `set`. Never iterated: its order differs between members.
    lease_of: HashMap<Arc<[u8]>, i64>,
    min_ttl: i64,
}

impl Leases {
    /// `min_ttl` in seconds: entries of members that do not raise a time to live before they propose it carry what
    /// their client asked for.
    pub fn new(min_ttl: i64) -> Self {
        Self { min_ttl, ..Self::default() }
    }

    /// The leases that are stored, without their keys.
    pub fn load(storage: &dyn Storage, min_ttl: i64) -> Result<Self, storage::Error> {
        let mut leases = Self::new(min_ttl);
        let mut damaged = None;
        storage.scan(Bucket::Lease, &[], &[], &mut |key, value| match decode_row(key, value) {
            Some(row) => {
                leases.set.insert(row.id, row.ttl, row.remaining_ttl);
                true
            }
            None => {
                damaged = Some(storage::Error::Fatal(format!("the lease row {key:02x?} cannot be read")));
                false
            }
        })?;
        damaged.map_or(Ok(leases), Err)
    }

    /// The state to publish in a view.
    pub fn set(&self) -> &LeaseSet {
        &self.set
    }

    /// Grants a lease; the time to live that holds.
    pub fn grant(&mut self, id: i64, ttl: i64, batch: &mut WriteBatch) -> Result<i64, Error> {
        if ttl > TTL_MAX {
            return Err(Error::TtlTooLarge);
        }
        if id == 0 {
            // 0 means "no lease" everywhere; whoever proposes a grant has picked an id.
            return Err(Error::NotFound);
        }
        if self.set.contains(id) {
            return Err(Error::Exists);
        }
        let ttl = ttl.max(self.min_ttl);
        self.set.insert(id, ttl, 0);
        put_row(batch, id, ttl, 0);
        Ok(ttl)
    }

    /// Removes a lease; the keys that were attached, ascending. The caller deletes them in one revision.
    pub fn revoke(&mut self, id: i64, batch: &mut WriteBatch) -> Result<Vec<Bytes>, Error> {
        let keys = self.set.remove(id).ok_or(Error::NotFound)?;
        batch.delete(Bucket::Lease, Bytes::copy_from_slice(&row_key(id)));
        for key in &keys {
            self.lease_of.remove(key);
        }
        Ok(keys.into_iter().map(Bytes::from_owner).collect())
    }

    /// Notes that `remaining` seconds are left of a lease; 0 after a renewal: all of them. `persist`: also over a
    /// restart, where the cluster version or a feature gate allows that row format.
    pub fn checkpoint(&mut self, id: i64, remaining: i64, persist: bool, batch: &mut WriteBatch) -> Result<(), Error> {
        let ttl = self.set.ttl(id).ok_or(Error::NotFound)?;
        self.set.set_checkpoint(id, remaining);
        if persist {
            put_row(batch, id, ttl, remaining);
        }
        Ok(())
    }

    pub fn exists(&self, lease: i64) -> bool {
        self.set.contains(lease)
    }

    /// The lease that `key` is attached to; 0 for none.
    pub fn lease_of(&self, key: &[u8]) -> i64 {
        self.lease_of.get(key).copied().unwrap_or(0)
    }

    /// Attaches `key` to `lease`, away from any other; 0: to none. The caller has checked that the lease exists.
    pub fn attach(&mut self, lease: i64, key: &Bytes) {
        if lease == 0 {
            return self.detach(key);
        }
        assert!(self.move_to(lease, key), "a key is put with the unknown lease {lease:x}");
    }

    pub fn detach(&mut self, key: &[u8]) {
        if let Some(lease) = self.lease_of.remove(key) {
            self.set.detach(lease, key);
        }
    }

    /// [`Leases::attach`] at start, from a stored record; false if no such lease is stored.
    #[must_use]
    pub fn restore_attachment(&mut self, lease: i64, key: &[u8]) -> bool {
        self.move_to(lease, key)
    }

    fn move_to(&mut self, lease: i64, key: &[u8]) -> bool {
        if !self.set.contains(lease) {
            return false;
        }
        if self.lease_of(key) == lease {
            return true;
        }
        self.detach(key);
        // A copy of its own: a slice of the request would keep the whole request alive.
        let key: Arc<[u8]> = key.into();
        self.set.attach(lease, Arc::clone(&key));
        self.lease_of.insert(key, lease);
        true
    }
}

fn row_key(id: i64) -> [u8; 8] {
    id.to_be_bytes()
}

fn put_row(batch: &mut WriteBatch, id: i64, ttl: i64, remaining_ttl: i64) {
    let row = leasepb::Lease { id, ttl, remaining_ttl };
    batch.put(Bucket::Lease, Bytes::copy_from_slice(&row_key(id)), row.encode_to_vec());
}

fn decode_row(key: &[u8], value: Bytes) -> Option<leasepb::Lease> {
    let row = leasepb::Lease::decode(value).ok()?;
    (key == row_key(row.id)).then_some(row)
}
