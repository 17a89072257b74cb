//! How the process's open files are shared out, so that no number of connections takes those the log and the store need.

use anyhow::{Context, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Kept from clients (limits, housekeeping): for the log, the store, other members, and what the runtimes themselves need.
const RESERVED: u64 = 150;
/// Parts of `RESERVED`, and the least that each gets.
const TABLES_MIN: u64 = 32;
const PEERS_MIN: u64 = 48;
/// More than these are of no use.
const TABLES_MAX: u64 = 900;
const PEERS_MAX: u64 = 1024;
/// Runtimes that `RESERVED` counts on, and what each one beyond needs.
const RUNTIMES: u64 = 4;
const PER_RUNTIME: u64 = 5;
/// However little there is.
const CLIENTS_MIN: u64 = 16;
/// Of the clients' connections, at most: for listeners for metrics, which must answer when all others are taken.
const METRICS: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptors {
    /// Connections of clients, of all listeners together.
    pub clients: usize,
    /// Connections that other members make.
    pub peers: usize,
    /// Tables of the store that are kept open.
    pub tables: usize,
}

impl Descriptors {
    /// Raises the soft limit to the hard one, as Go does for every program, and shares it out.
    pub fn of_this_process(runtimes: usize) -> anyhow::Result<Self> {
        let limit = getrlimit(Resource::Nofile);
        if limit.current != limit.maximum {
            let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
            raised.context("cannot raise the limit of open files to what is allowed")?;
        }
        Self::share(limit.maximum.unwrap_or(u64::MAX), runtimes as u64)
    }

    /// Connections on listeners for clients, and on those for metrics where there are any.
    pub fn for_clients_and_metrics(&self, has_metrics: bool) -> (usize, usize) {
        let metrics = if has_metrics { METRICS.min(self.clients / 4) } else { 0 };
        (self.clients - metrics, metrics)
    }

    fn share(limit: u64, runtimes: u64) -> anyhow::Result<Self> {
        if limit <= RESERVED {
            bail!(
                "file descriptor limit of etcd process is too low; please set higher: it is {limit}, not above {RESERVED}"
            );
        }
        let share = limit / 16;
        let (tables, peers) = (share.clamp(TABLES_MIN, TABLES_MAX), share.clamp(PEERS_MIN, PEERS_MAX));
        let others = runtimes.saturating_sub(RUNTIMES) * PER_RUNTIME;
        let reserved = RESERVED + (tables - TABLES_MIN) + (peers - PEERS_MIN) + others;
        let clients = limit.saturating_sub(reserved).max(CLIENTS_MIN);
        // A semaphore has no more permits than this, and no machine as many sockets.
        let clients = usize::try_from(clients).unwrap_or(usize::MAX).min(tokio::sync::Semaphore::MAX_PERMITS);
        Ok(Self { clients, peers: peers as usize, tables: tables as usize })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_get_what_the_server_does_not_need() {
        let share = |limit, runtimes| Descriptors::share(limit, runtimes).expect("enough");
        assert_eq!(share(200, 2), Descriptors { clients: 50, peers: 48, tables: 32 });
        assert_eq!(share(1024, 4), Descriptors { clients: 826, peers: 64, tables: 64 });
        assert_eq!(share(1024, 64).clients, 526);
        assert_eq!(share(151, 2).clients, 16);
        for limit in [300, 1_000, 10_000, 1 << 20] {
            let Descriptors { clients, peers, tables } = share(limit, 4);
            // What is left of etcd's 150 is for the log, the runtimes and the like.
            assert!((clients + peers + tables) as u64 + 70 <= limit, "{limit}");
        }
        assert_eq!(share(200, 2).for_clients_and_metrics(false), (50, 0));
        assert_eq!(share(200, 2).for_clients_and_metrics(true), (38, 12));
        assert_eq!(share(1024, 4).for_clients_and_metrics(true), (810, 16));
        assert!(share(u64::MAX, 1).clients > 1 << 20);
        assert!(Descriptors::share(150, 1).is_err());
    }
}
