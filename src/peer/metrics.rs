//! The numbers of the connections, and their text on `/metrics`.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::status::Status;
use crate::{
    cluster::ids::hex,
    telemetry::{Histogram, Text},
};

/// 0.1 ms to 3.2768 s, doubling.
const ROUND_TRIP_BOUNDS: &[f64] = &[
    0.0001, 0.0002, 0.0004, 0.0008, 0.0016, 0.0032, 0.0064, 0.0128, 0.0256, 0.0512, 0.1024, 0.2048, 0.4096, 0.8192,
    1.6384, 3.2768,
];
/// 0.1 s to 51.2 s, doubling.
const SNAPSHOT_BOUNDS: &[f64] = &[0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2];

/// What is counted for one other member.
#[derive(Debug)]
pub struct PeerNumbers {
    pub status: Status,
    pub sent_bytes: AtomicU64,
    pub received_bytes: AtomicU64,
    pub sent_failures: AtomicU64,
    pub received_failures: AtomicU64,
    pub round_trip: Histogram,
    pub snapshots_sent: Snapshots,
    pub snapshots_received: Snapshots,
}

/// One direction of snapshots.
#[derive(Debug)]
pub struct Snapshots {
    pub under_way: AtomicU64,
    pub done: AtomicU64,
    pub failed: AtomicU64,
    pub took: Histogram,
}

impl Default for Snapshots {
    fn default() -> Self {
        Self { under_way: 0.into(), done: 0.into(), failed: 0.into(), took: Histogram::new(SNAPSHOT_BOUNDS) }
    }
}

impl Snapshots {
    /// Counts a transfer as under way until the value is dropped: then as failed, unless `done` was called.
    pub fn begin(numbers: &Arc<PeerNumbers>, of: fn(&PeerNumbers) -> &Snapshots) -> Transfer {
        of(numbers).under_way.fetch_add(1, Relaxed);
        Transfer { numbers: numbers.clone(), of, began: std::time::Instant::now(), done: false }
    }
}

pub struct Transfer {
    numbers: Arc<PeerNumbers>,
    of: fn(&PeerNumbers) -> &Snapshots,
    began: std::time::Instant,
    done: bool,
}

impl Transfer {
    pub fn done(mut self) {
        self.done = true;
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        let numbers = (self.of)(&self.numbers);
        numbers.under_way.fetch_sub(1, Relaxed);
        if self.done {
            numbers.done.fetch_add(1, Relaxed);
            numbers.took.record(self.began.elapsed());
        } else {
            numbers.failed.fetch_add(1, Relaxed);
        }
    }
}

impl Default for PeerNumbers {
    fn default() -> Self {
        Self {
            status: Status::default(),
            sent_bytes: 0.into(),
            received_bytes: 0.into(),
            sent_failures: 0.into(),
            received_failures: 0.into(),
            round_trip: Histogram::new(ROUND_TRIP_BOUNDS),
            snapshots_sent: Snapshots::default(),
            snapshots_received: Snapshots::default(),
        }
    }
}

/// The numbers of everybody this member has talked to; they stay when a member goes.
#[derive(Debug)]
pub struct Numbers {
    member_id: u64,
    peers: Mutex<BTreeMap<u64, Arc<PeerNumbers>>>,
}

/// Senders beyond this many share the numbers of id 0: anybody may claim any id.
const PEERS_MAX: usize = 256;

/// Name, help, how to read it.
type Reading = (&'static str, &'static str, fn(&PeerNumbers) -> u64);

const OF_MEMBERS: &[(&str, Reading)] = &[
    (
        "gauge",
        ("etcd_network_active_peers", "The current number of active peer connections.", |p| {
            u64::from(p.status.since().is_some())
        }),
    ),
    (
        "counter",
        ("etcd_network_disconnected_peers_total", "The total number of disconnected peers.", |p| {
            p.status.disconnects.load(Relaxed)
        }),
    ),
];

const COUNTERS: &[(&str, Reading)] = &[
    ("To", ("etcd_network_peer_sent_bytes_total", "Bytes sent to peers.", |p| p.sent_bytes.load(Relaxed))),
    (
        "From",
        ("etcd_network_peer_received_bytes_total", "Bytes received from peers.", |p| p.received_bytes.load(Relaxed)),
    ),
    (
        "To",
        ("etcd_network_peer_sent_failures_total", "Messages for peers that were lost.", |p| {
            p.sent_failures.load(Relaxed)
        }),
    ),
    (
        "From",
        ("etcd_network_peer_received_failures_total", "Failures to receive from peers.", |p| {
            p.received_failures.load(Relaxed)
        }),
    ),
    ("To", ("etcd_network_snapshot_send_success", "Snapshots sent.", |p| p.snapshots_sent.done.load(Relaxed))),
    (
        "To",
        ("etcd_network_snapshot_send_failures", "Snapshots that could not be sent.", |p| {
            p.snapshots_sent.failed.load(Relaxed)
        }),
    ),
    (
        "From",
        ("etcd_network_snapshot_receive_success", "Snapshots received.", |p| p.snapshots_received.done.load(Relaxed)),
    ),
    (
        "From",
        ("etcd_network_snapshot_receive_failures", "Snapshots that could not be received.", |p| {
            p.snapshots_received.failed.load(Relaxed)
        }),
    ),
];

const GAUGES: &[(&str, Reading)] = &[
    (
        "To",
        ("etcd_network_snapshot_send_inflights_total", "Snapshots being sent.", |p| {
            p.snapshots_sent.under_way.load(Relaxed)
        }),
    ),
    (
        "From",
        ("etcd_network_snapshot_receive_inflights_total", "Snapshots being received.", |p| {
            p.snapshots_received.under_way.load(Relaxed)
        }),
    ),
];

type Times = (&'static str, &'static str, &'static str, fn(&PeerNumbers) -> &Histogram);

const HISTOGRAMS: &[Times] = &[
    ("To", "etcd_network_peer_round_trip_time_seconds", "Round trip time between members.", |p| &p.round_trip),
    ("To", "etcd_network_snapshot_send_total_duration_seconds", "Time of sending a snapshot.", |p| {
        &p.snapshots_sent.took
    }),
    ("From", "etcd_network_snapshot_receive_total_duration_seconds", "Time of receiving a snapshot.", |p| {
        &p.snapshots_received.took
    }),
];

impl Numbers {
    pub fn new(member_id: u64) -> Self {
        Self { member_id, peers: Mutex::default() }
    }

    /// The numbers of the member `id`.
    pub fn of(&self, id: u64) -> Arc<PeerNumbers> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let id = if peers.len() >= PEERS_MAX && !peers.contains_key(&id) { 0 } else { id };
        peers.entry(id).or_default().clone()
    }

    /// Nothing before the first other member.
    pub fn render(&self, out: &mut Text) {
        let peers: Vec<(String, Arc<PeerNumbers>)> = {
            let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
            peers.iter().map(|(id, numbers)| (hex(*id), numbers.clone())).collect()
        };
        if peers.is_empty() {
            return;
        }
        let local = hex(self.member_id);
        for (kind, (name, help, read)) in OF_MEMBERS {
            out.head(name, kind, help);
            for (id, numbers) in &peers {
                out.sample(name, &[("Local", &local), ("Remote", id)], read(numbers));
            }
        }
        for (kind, list) in [("counter", COUNTERS), ("gauge", GAUGES)] {
            for (label, (name, help, read)) in list {
                out.head(name, kind, help);
                for (id, numbers) in &peers {
                    out.sample(name, &[(label, id)], read(numbers));
                }
            }
        }
        for (label, name, help, read) in HISTOGRAMS {
            out.head(name, "histogram", help);
            for (id, numbers) in &peers {
                out.times(name, &[(label, id)], read(numbers));
            }
        }
    }
}
