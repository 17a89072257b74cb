//! Which actor runs on which thread: one table, settled by measurement (see Decisions in the architecture page).

/// Threads that run actors. RPC runtimes are beside them, one per core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    Raft,
    Wal,
    Apply,
    /// Blocks in syncs of the store.
    Checkpoint,
    /// Connections to other members.
    Peer,
    /// Actors that do little: lease expirer, compactor.
    Shared,
}

/// (actor, thread, a panic in it ends the process)
pub const TABLE: &[(&str, Thread, bool)] = &[
    ("raft", Thread::Raft, true),
    ("wal", Thread::Wal, true),
    ("apply", Thread::Apply, true),
    ("checkpointer", Thread::Checkpoint, true),
    ("peer", Thread::Peer, true),
    ("lease_expirer", Thread::Shared, true),
    ("compactor", Thread::Shared, false),
];

/// One arbiter per thread of the table, made when first asked for.
#[derive(Default)]
pub struct Arbiters(Vec<(Thread, actix_rt::Arbiter)>);

impl Arbiters {
    /// The arbiter for `actor` and whether its panic ends the process. Panics if the table has no such actor.
    pub fn place(&mut self, actor: &str) -> (actix_rt::ArbiterHandle, bool) {
        let (_, thread, vital) =
            *TABLE.iter().find(|row| row.0 == actor).expect("every actor is in the placement table");
        if let Some((_, arbiter)) = self.0.iter().find(|(t, _)| *t == thread) {
            return (arbiter.handle(), vital);
        }
        let arbiter = actix_rt::Arbiter::new();
        let handle = arbiter.handle();
        self.0.push((thread, arbiter));
        (handle, vital)
    }

    /// Asks every arbiter to stop and waits for its thread.
    pub fn stop(self) {
        for (_, arbiter) in self.0 {
            arbiter.stop();
            let _ = arbiter.join();
        }
    }
}
