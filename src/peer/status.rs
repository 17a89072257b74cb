//! Whether another member can be reached, and where.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crate::config::Url;

/// Connected or not, and since when.
#[derive(Debug)]
pub struct Status {
    start: Instant,
    /// Nanoseconds after `start`, plus one; 0 while not connected.
    since: AtomicU64,
    /// Times it went from connected to not.
    pub disconnects: AtomicU64,
}

impl Default for Status {
    fn default() -> Self {
        Self { start: Instant::now(), since: 0.into(), disconnects: 0.into() }
    }
}

impl Status {
    /// A stream was opened or a message delivered.
    pub fn connected(&self) {
        let now = self.start.elapsed().as_nanos() as u64 + 1;
        let _ = self.since.compare_exchange(0, now, Relaxed, Relaxed);
    }

    /// Something failed on the way.
    pub fn disconnected(&self) {
        if self.since.swap(0, Relaxed) != 0 {
            self.disconnects.fetch_add(1, Relaxed);
        }
    }

    pub fn since(&self) -> Option<Instant> {
        let since = self.since.load(Relaxed);
        (since != 0).then(|| self.start + Duration::from_nanos(since - 1))
    }
}

/// The URLs of a member, one of them in use.
#[derive(Debug, Default)]
pub struct Urls(Mutex<(Vec<Url>, usize)>);

impl Urls {
    pub fn new(urls: Vec<Url>) -> Self {
        Self(Mutex::new((urls, 0)))
    }

    pub fn set(&self, urls: Vec<Url>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.0 != urls {
            *state = (urls, 0);
        }
    }

    pub fn all(&self) -> Vec<Url> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// The one in use; `None` if there is none.
    pub fn pick(&self) -> Option<Url> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.0.get(state.1).cloned()
    }

    /// Goes on to the next, unless another caller already did.
    pub fn failed(&self, url: &Url) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.0.get(state.1) == Some(url) {
            state.1 = (state.1 + 1) % state.0.len();
        }
    }
}

/// One log line when a link breaks, one when it is back, and one more for each new reason, but not in a flood.
#[derive(Debug, Default)]
pub struct Link {
    up: bool,
    told: Option<(String, Instant)>,
}

/// Another reason is told no sooner than this after the last line.
const QUIET: Duration = Duration::from_secs(10);

impl Link {
    /// True if it is to be told.
    pub fn is_up(&mut self) -> bool {
        self.told = None;
        !std::mem::replace(&mut self.up, true)
    }

    /// True if it is to be told.
    pub fn is_down(&mut self, reason: &str, now: Instant) -> bool {
        let fresh = match &self.told {
            _ if self.up => true,
            None => true,
            Some((told, at)) => told != reason && now.saturating_duration_since(*at) >= QUIET,
        };
        self.up = false;
        if fresh {
            self.told = Some((reason.to_owned(), now));
        }
        fresh
    }
}
