//! Admission: a permit is one slot and some bytes, waited for in arrival order.
//!
//! The permit travels inside the message and is given back when it is dropped, i.e. when the work is done: whatever
//! happens to a message on its way, its place is free again. Whoever frees permits never waits for one.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

#[derive(Clone, Debug)]
pub struct Gate(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: &'static str,
    slots: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    slots_max: AtomicUsize,
    bytes_max: AtomicUsize,
    waits: AtomicU64,
    waiting: AtomicUsize,
}

/// Counts who waits, for as long as it does.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn begin(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Room for one piece of work.
#[derive(Debug)]
pub struct Permit {
    _slot: OwnedSemaphorePermit,
    bytes: Option<OwnedSemaphorePermit>,
}

impl Permit {
    /// Gives back what goes beyond `bytes`.
    pub fn shrink_to(&mut self, bytes: usize) {
        if let Some(held) = &mut self.bytes {
            drop(held.split(held.num_permits().saturating_sub(bytes)));
        }
    }
}

impl Gate {
    pub fn new(name: &'static str, slots: usize, bytes: usize) -> Self {
        Self(Arc::new(Inner {
            name,
            slots: Arc::new(Semaphore::new(slots)),
            bytes: Arc::new(Semaphore::new(bytes)),
            slots_max: slots.into(),
            bytes_max: bytes.into(),
            waits: 0.into(),
            waiting: 0.into(),
        }))
    }

    /// Waits, in arrival order, for a slot and `bytes` (cut to the gate's size, so that nothing waits for ever).
    pub async fn enter(&self, bytes: usize) -> Permit {
        if let Some(permit) = self.try_enter(bytes) {
            return permit;
        }
        self.0.waits.fetch_add(1, Relaxed);
        let _waiting = Waiting::begin(&self.0.waiting);
        const OPEN: &str = "a gate's semaphores are never closed";
        let slot = self.0.slots.clone().acquire_owned().await.expect(OPEN);
        let bytes = self.0.bytes.clone().acquire_many_owned(self.clamp(bytes)).await.expect(OPEN);
        Permit { _slot: slot, bytes: Some(bytes) }
    }

    pub fn try_enter(&self, bytes: usize) -> Option<Permit> {
        let slot = self.0.slots.clone().try_acquire_owned().ok()?;
        let bytes = self.0.bytes.clone().try_acquire_many_owned(self.clamp(bytes)).ok()?;
        Some(Permit { _slot: slot, bytes: Some(bytes) })
    }

    fn clamp(&self, bytes: usize) -> u32 {
        u32::try_from(bytes.min(self.0.bytes_max.load(Relaxed))).unwrap_or(u32::MAX)
    }

    /// Changes the number of slots while the gate is in use.
    pub fn resize(&self, slots: usize) {
        let old = self.0.slots_max.swap(slots, Relaxed);
        if slots > old {
            self.0.slots.add_permits(slots - old);
        } else {
            // Slots in use are taken away as they come back.
            let mut missing = (old - slots) - self.0.slots.forget_permits(old - slots);
            while missing > 0 {
                let n = u32::try_from(missing).unwrap_or(u32::MAX);
                let slots = self.0.slots.clone();
                actix_rt::spawn(async move {
                    if let Ok(permits) = slots.acquire_many_owned(n).await {
                        permits.forget();
                    }
                });
                missing -= n as usize;
            }
        }
    }

    pub fn name(&self) -> &'static str {
        self.0.name
    }

    /// Slots in use, and all slots.
    pub fn usage(&self) -> (usize, usize) {
        let max = self.0.slots_max.load(Relaxed);
        (max.saturating_sub(self.0.slots.available_permits()), max)
    }

    /// Bytes in use, and all bytes.
    pub fn usage_bytes(&self) -> (usize, usize) {
        let max = self.0.bytes_max.load(Relaxed);
        (max.saturating_sub(self.0.bytes.available_permits()), max)
    }

    /// How often someone had to wait.
    pub fn waits(&self) -> u64 {
        self.0.waits.load(Relaxed)
    }

    /// How many wait now.
    pub fn waiting(&self) -> usize {
        self.0.waiting.load(Relaxed)
    }
}
