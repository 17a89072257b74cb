//! Counters and live controls of one actor: plain atomics, written by the actor and its senders, read by exporters.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde::Serialize;

/// Time spent, as a count and a sum.
#[derive(Debug, Default)]
pub struct Timer {
    count: AtomicU64,
    nanos: AtomicU64,
}

impl Timer {
    pub fn add(&self, count: u64, spent: Duration) {
        self.count.fetch_add(count, Relaxed);
        self.nanos.fetch_add(spent.as_nanos() as u64, Relaxed);
    }

    pub fn read(&self) -> TimerValue {
        TimerValue { count: self.count.load(Relaxed), seconds: self.nanos.load(Relaxed) as f64 / 1e9 }
    }
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct TimerValue {
    pub count: u64,
    pub seconds: f64,
}

/// Settings an operator may change while the actor runs.
#[derive(Debug)]
pub struct Controls {
    /// Messages the data lane holds before senders are told that it is full.
    pub capacity: AtomicUsize,
    /// Bytes it holds before that.
    pub capacity_bytes: AtomicUsize,
    /// Messages taken in one turn at most.
    pub batch_max: AtomicUsize,
    /// Work done in one turn at most before the control lane is looked at again.
    pub turn_micros_max: AtomicU64,
    /// While set, only the control lane is served.
    pub paused: AtomicBool,
}

/// Why a sender was turned away or a message thrown away.
#[derive(Clone, Copy, Debug)]
pub enum Refusal {
    /// The data lane held as many messages as it may.
    Full = 0,
    /// The data lane held as many bytes as it may.
    FullBytes = 1,
    /// The actor has stopped.
    Stopped = 2,
    /// The actor itself dropped the message (its meaning allows that).
    Dropped = 3,
}

pub const REFUSALS: [&str; 4] = ["full", "full_bytes", "stopped", "dropped"];

#[derive(Debug)]
pub struct Stats {
    pub name: &'static str,
    pub kinds: &'static [&'static str],
    pub controls: Controls,
    start: Instant,
    depth: AtomicUsize,
    bytes: AtomicUsize,
    depth_max: AtomicUsize,
    /// Nanoseconds since `start` when the oldest message was queued, or, while messages are left over from a turn, the last
    /// one it served; 0 = lane empty.
    oldest: AtomicU64,
    wait: Vec<Timer>,
    service: Vec<Timer>,
    turns: Timer,
    batch_messages: AtomicU64,
    batch_max_seen: AtomicUsize,
    refusals: [AtomicU64; REFUSALS.len()],
    blocked: Timer,
    /// Nanoseconds since `start` when the current turn began; 0 = idle.
    busy_since: AtomicU64,
    /// Kind being worked on, or `kinds.len()`.
    busy_kind: AtomicUsize,
}

impl Stats {
    pub fn new(name: &'static str, kinds: &'static [&'static str], capacity: usize, capacity_bytes: usize) -> Self {
        Self {
            name,
            kinds,
            controls: Controls {
                capacity: capacity.into(),
                capacity_bytes: capacity_bytes.into(),
                batch_max: usize::MAX.into(),
                turn_micros_max: 1000.into(),
                paused: false.into(),
            },
            start: Instant::now(),
            depth: 0.into(),
            bytes: 0.into(),
            depth_max: 0.into(),
            oldest: 0.into(),
            wait: kinds.iter().map(|_| Timer::default()).collect(),
            service: kinds.iter().map(|_| Timer::default()).collect(),
            turns: Timer::default(),
            batch_messages: 0.into(),
            batch_max_seen: 0.into(),
            refusals: Default::default(),
            blocked: Timer::default(),
            busy_since: 0.into(),
            busy_kind: kinds.len().into(),
        }
    }

    /// Takes room for one message; the reason if there is none.
    pub(super) fn reserve(&self, bytes: usize) -> Result<(), Refusal> {
        let depth = self.depth.fetch_add(1, Relaxed);
        let held = self.bytes.fetch_add(bytes, Relaxed);
        let refusal = if depth >= self.controls.capacity.load(Relaxed) {
            Refusal::Full
        } else if held > 0 && held + bytes > self.controls.capacity_bytes.load(Relaxed) {
            Refusal::FullBytes
        } else {
            self.depth_max.fetch_max(depth + 1, Relaxed);
            return Ok(());
        };
        self.depth.fetch_sub(1, Relaxed);
        self.bytes.fetch_sub(bytes, Relaxed);
        self.refuse(refusal);
        Err(refusal)
    }

    pub(super) fn queued(&self, at: Instant) {
        if self.oldest.load(Relaxed) == 0 {
            self.oldest.store(self.nanos(at), Relaxed);
        }
    }

    pub(super) fn release(&self, bytes: usize) {
        self.depth.fetch_sub(1, Relaxed);
        self.bytes.fetch_sub(bytes, Relaxed);
    }

    pub fn refuse(&self, why: Refusal) {
        self.refusals[why as usize].fetch_add(1, Relaxed);
    }

    /// Time this actor could not go on because the next hop was full or slow.
    pub fn blocked(&self, spent: Duration) {
        self.blocked.add(1, spent);
    }

    pub fn depth(&self) -> usize {
        self.depth.load(Relaxed)
    }

    /// True if another message of `bytes` would be taken now.
    pub fn has_room(&self) -> bool {
        self.depth.load(Relaxed) < self.controls.capacity.load(Relaxed)
            && self.bytes.load(Relaxed) < self.controls.capacity_bytes.load(Relaxed)
    }

    fn nanos(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.start).as_nanos() as u64 + 1
    }

    pub(super) fn turn_begins(&self, now: Instant) {
        self.busy_since.store(self.nanos(now), Relaxed);
    }

    pub(super) fn works_on(&self, kind: usize, queued: Instant) {
        self.busy_kind.store(kind, Relaxed);
        self.oldest.store(self.nanos(queued), Relaxed);
    }

    pub(super) fn served(&self, kind: usize, count: u64, waited: Duration, spent: Duration) {
        self.wait[kind].add(count, waited);
        self.service[kind].add(count, spent);
    }

    pub(super) fn turn_ends(&self, messages: usize, spent: Duration) {
        self.turns.add(1, spent);
        self.batch_messages.fetch_add(messages as u64, Relaxed);
        self.batch_max_seen.fetch_max(messages, Relaxed);
        self.busy_kind.store(self.kinds.len(), Relaxed);
        self.busy_since.store(0, Relaxed);
        if self.depth() == 0 {
            self.oldest.store(0, Relaxed);
        }
    }

    /// What the actor is doing and since when; `None` when idle.
    pub fn busy(&self, now: Instant) -> Option<(&'static str, Duration)> {
        let since = self.busy_since.load(Relaxed);
        let kind = self.kinds.get(self.busy_kind.load(Relaxed)).copied().unwrap_or("turn");
        (since != 0).then(|| (kind, Duration::from_nanos(self.nanos(now).saturating_sub(since))))
    }

    pub fn snapshot(&self, now: Instant) -> Snapshot {
        let oldest = self.oldest.load(Relaxed);
        let busy = self.busy(now);
        Snapshot {
            name: self.name,
            depth: self.depth(),
            bytes: self.bytes.load(Relaxed),
            capacity: self.controls.capacity.load(Relaxed),
            capacity_bytes: self.controls.capacity_bytes.load(Relaxed),
            paused: self.controls.paused.load(Relaxed),
            depth_max: self.depth_max.load(Relaxed),
            oldest_seconds: if oldest == 0 { 0.0 } else { self.nanos(now).saturating_sub(oldest) as f64 / 1e9 },
            kinds: self
                .kinds
                .iter()
                .enumerate()
                .map(|(i, name)| Kind { name, wait: self.wait[i].read(), service: self.service[i].read() })
                .collect(),
            turns: self.turns.read(),
            batch_messages: self.batch_messages.load(Relaxed),
            batch_max: self.batch_max_seen.load(Relaxed),
            refusals: REFUSALS.iter().zip(&self.refusals).map(|(name, n)| (*name, n.load(Relaxed))).collect(),
            blocked: self.blocked.read(),
            doing: busy.map(|b| b.0),
            doing_seconds: busy.map_or(0.0, |b| b.1.as_secs_f64()),
        }
    }
}

/// One reading of all counters.
#[derive(Clone, Debug, Serialize)]
pub struct Snapshot {
    pub name: &'static str,
    pub depth: usize,
    pub bytes: usize,
    pub capacity: usize,
    pub capacity_bytes: usize,
    pub paused: bool,
    pub depth_max: usize,
    pub oldest_seconds: f64,
    pub kinds: Vec<Kind>,
    pub turns: TimerValue,
    pub batch_messages: u64,
    pub batch_max: usize,
    pub refusals: Vec<(&'static str, u64)>,
    pub blocked: TimerValue,
    pub doing: Option<&'static str>,
    pub doing_seconds: f64,
}

#[derive(Clone, Debug, Serialize)]
pub struct Kind {
    pub name: &'static str,
    pub wait: TimerValue,
    pub service: TimerValue,
}
