//! Hot values of `Bucket::Key` in memory, bounded by bytes.
//!
//! A hit is one hash and one shard lock (~50 ns) where a read of the store walks a memtable and a block.
//! Rows are immutable but for deletion; nevertheless a reader that fetched a value while a commit changed
//! its row must not leave the old value behind, which is what the epoch is for.

use bytes::Bytes;
use quick_cache::sync::Cache;
use quick_cache::{OptionsBuilder, Weighter};
use std::sync::atomic::{AtomicU64, Ordering};

/// What an entry costs besides its value: key, hash table slot, allocation headers.
const ENTRY_OVERHEAD: usize = 96;

/// Longer keys are not cached; revisions take 17 or 18 bytes.
const MAX_KEY: usize = 23;

#[derive(Clone, PartialEq, Eq, Hash)]
struct CacheKey {
    len: u8,
    bytes: [u8; MAX_KEY],
}

impl CacheKey {
    fn new(key: &[u8]) -> Option<Self> {
        if key.len() > MAX_KEY {
            return None;
        }
        let mut bytes = [0; MAX_KEY];
        bytes[..key.len()].copy_from_slice(key);
        Some(Self { len: key.len() as u8, bytes })
    }
}

#[derive(Clone)]
struct ByBytes;

impl Weighter<CacheKey, Bytes> for ByBytes {
    fn weight(&self, _: &CacheKey, value: &Bytes) -> u64 {
        (value.len() + ENTRY_OVERHEAD) as u64
    }
}

pub(super) struct ValueCache {
    /// `None` when the capacity is zero.
    values: Option<Cache<CacheKey, Bytes, ByBytes>>,
    /// Counts the commits that touched rows kept here.
    epoch: AtomicU64,
}

impl ValueCache {
    pub(super) fn new(capacity_bytes: u64) -> Self {
        let values = (capacity_bytes > 0).then(|| {
            // Few shards: a value larger than its shard's share is never kept, and 2 MiB requests exist.
            let shards = usize::try_from(capacity_bytes / (4 << 20)).unwrap_or(usize::MAX).clamp(1, 32);
            let options = OptionsBuilder::new()
                .shards(shards)
                .estimated_items_capacity(usize::try_from(capacity_bytes / 512).unwrap_or(usize::MAX))
                .weight_capacity(capacity_bytes)
                // Half for what was written or read last: a row is most likely read soon after it was written.
                .hot_allocation(0.5)
                .build()
                .expect("both capacities are given");
            Cache::with_options(options, ByBytes, Default::default(), Default::default())
        });
        Self { values, epoch: AtomicU64::new(0) }
    }

    /// The value of `key`, from memory or else through `fetch`.
    pub(super) fn get<E>(
        &self,
        key: &[u8],
        fetch: impl FnOnce() -> Result<Option<Bytes>, E>,
    ) -> Result<Option<Bytes>, E> {
        let (Some(values), Some(cache_key)) = (&self.values, CacheKey::new(key)) else {
            return fetch();
        };
        if let Some(value) = values.get(&cache_key) {
            return Ok(Some(value));
        }
        let before = self.epoch.load(Ordering::SeqCst);
        let fetched = fetch()?;
        if let Some(value) = &fetched
            && self.epoch.load(Ordering::SeqCst) == before
        {
            values.insert(cache_key.clone(), value.clone());
            if self.epoch.load(Ordering::SeqCst) != before {
                values.remove(&cache_key);
            }
        }
        Ok(fetched)
    }

    /// The rows a commit has just written or, with `None`, deleted. Called after the store shows them.
    pub(super) fn committed<'a>(&self, rows: impl Iterator<Item = (&'a Bytes, Option<&'a Bytes>)>) {
        let Some(values) = &self.values else { return };
        self.epoch.fetch_add(1, Ordering::SeqCst);
        for (key, value) in rows {
            let Some(key) = CacheKey::new(key) else { continue };
            match value {
                Some(value) => values.insert(key, value.clone()),
                None => {
                    values.remove(&key);
                }
            }
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.values.as_ref().map_or(0, Cache::weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fetched(value: &'static str) -> Result<Option<Bytes>, ()> {
        Ok(Some(Bytes::from(value)))
    }

    #[test]
    fn weight_stays_within_the_capacity() {
        let cache = ValueCache::new(1 << 20);
        for n in 0..4000u32 {
            let key = Bytes::from(n.to_be_bytes().to_vec());
            let value = Bytes::from(vec![0; 1000]);
            cache.committed([(&key, Some(&value))].into_iter());
        }
        assert!(cache.bytes() <= 1 << 20, "{}", cache.bytes());
        assert!(cache.bytes() > 1 << 19, "{}", cache.bytes());
    }

    #[test]
    fn value_fetched_while_its_row_was_deleted_is_not_kept() {
        let cache = ValueCache::new(1 << 20);
        let key = Bytes::from_static(b"k");
        let got = cache.get(&key, || {
            cache.committed([(&key, None)].into_iter());
            fetched("old")
        });
        assert_eq!(got, fetched("old"));
        assert_eq!(cache.get(&key, || Ok::<_, ()>(None)), Ok(None));
    }

    #[test]
    fn value_fetched_in_peace_is_kept_until_deleted() {
        let cache = ValueCache::new(1 << 20);
        let key = Bytes::from_static(b"k");
        assert_eq!(cache.get(&key, || fetched("v")), fetched("v"));
        assert_eq!(cache.get(&key, || Err(())), fetched("v"));
        cache.committed([(&key, None)].into_iter());
        assert_eq!(cache.get(&key, || Err(())), Err(()));
    }
}
