//! What readers see: an immutable picture of the whole replicated state, behind one atomic pointer.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::Alarms;
use crate::{cluster::Members, lease::LeaseSet, mvcc};

#[derive(Clone, Debug)]
pub struct View {
    pub kv: Arc<mvcc::View>,
    pub leases: LeaseSet,
    pub alarms: Alarms,
    pub members: Members,
    pub applied_index: u64,
    pub applied_term: u64,
}

/// Where apply publishes. Reading takes no lock.
#[derive(Clone)]
pub struct ViewCell {
    current: Arc<ArcSwap<View>>,
    /// Told at each publication that somebody has asked for.
    told: Arc<Told>,
}

#[derive(Default)]
struct Told {
    waiting: std::sync::atomic::AtomicUsize,
    notify: tokio::sync::Notify,
}

impl ViewCell {
    pub fn new(view: View) -> Self {
        Self { current: Arc::new(ArcSwap::from_pointee(view)), told: Arc::default() }
    }

    pub fn load(&self) -> arc_swap::Guard<Arc<View>> {
        self.current.load()
    }

    pub fn load_full(&self) -> Arc<View> {
        self.current.load_full()
    }

    pub fn publish(&self, view: Arc<View>) {
        self.current.store(view);
        if self.told.waiting.load(std::sync::atomic::Ordering::SeqCst) > 0 {
            self.told.notify.notify_waiters();
        }
    }

    /// Waits for a view of which `done` holds.
    pub async fn until(&self, mut done: impl FnMut(&View) -> bool) -> Arc<View> {
        use std::sync::atomic::Ordering::SeqCst;
        struct Waiting<'a>(&'a Told);
        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.waiting.fetch_sub(1, SeqCst);
            }
        }
        self.told.waiting.fetch_add(1, SeqCst);
        let _waiting = Waiting(&self.told);
        loop {
            let published = self.told.notify.notified();
            tokio::pin!(published);
            published.as_mut().enable();
            let view = self.load_full();
            if done(&view) {
                return view;
            }
            published.await;
        }
    }
}
