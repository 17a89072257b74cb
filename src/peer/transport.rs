//! The connections to all other members: who there is, and which actor a message goes to.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;

use super::{
    Databases, Incoming, Links,
    actor::{Control, Outgoing, Parts, Peer},
    metrics::PeerNumbers,
    status::Urls,
    wire::Shared,
};
use crate::{
    actor::{Inbox, Registry, Sender, shell},
    cluster::{Member, ids::hex},
    config::Url,
    pb::raftpb::{Message, MessageType},
    telemetry::Text,
};

/// Messages and bytes that may wait for one peer actor; it passes them on at once.
const INBOX_MAX: usize = 4096;
const INBOX_BYTES_MAX: usize = 64 << 20;
/// Databases that may wait or be under way, to all members together.
const SNAPSHOTS_MAX: usize = 16;
/// Senders nobody has heard of that are remembered: anybody may claim any id.
const REMOTES_MAX: usize = 64;
/// A connection may take this much longer than an election.
const DIAL_EXTRA: Duration = Duration::from_secs(1);

pub struct Wiring {
    pub cluster_id: u64,
    pub member_id: u64,
    /// As told to other members.
    pub own_peer_urls: Vec<Url>,
    /// Where connections to other members come from; `None`: as the system likes it.
    pub local_address: Option<IpAddr>,
    pub election_timeout: Duration,
    pub incoming: Arc<dyn Incoming>,
    pub databases: Arc<dyn Databases>,
    /// Where peer actors and their connections run.
    pub arbiter: actix_rt::ArbiterHandle,
    pub registry: Registry,
}

pub struct Transport {
    pub(super) shared: Arc<Shared>,
    arbiter: actix_rt::ArbiterHandle,
    registry: Registry,
    peers: ArcSwap<HashMap<u64, Handle>>,
    /// Held while `peers` is replaced; true after the stop.
    changing: Mutex<bool>,
}

#[derive(Clone)]
pub(super) struct Handle {
    pub sender: Sender<Outgoing, Control>,
    pub numbers: Arc<PeerNumbers>,
    urls: Arc<Urls>,
    pub is_remote: bool,
}

impl Transport {
    /// A transport that knows nobody yet.
    pub fn start(wiring: Wiring) -> Arc<Self> {
        let (arbiter, registry) = (wiring.arbiter.clone(), wiring.registry.clone());
        let dial_timeout = DIAL_EXTRA + wiring.election_timeout;
        let shared = Shared::new(wiring, SNAPSHOTS_MAX, dial_timeout);
        Arc::new(Self {
            shared: Arc::new(shared),
            arbiter,
            registry,
            peers: ArcSwap::default(),
            changing: Mutex::new(false),
        })
    }

    /// Passes messages on; never waits. What cannot be taken is dropped and reported.
    pub fn send(&self, messages: Vec<Message>) {
        let peers = self.peers.load();
        // Only the last answer to appends tells anything new.
        let last_of = |to: u64| messages.iter().rposition(|m| is_append_answer(m) && m.to() == to);
        let superseded: Vec<bool> =
            messages.iter().enumerate().map(|(i, m)| is_append_answer(m) && last_of(m.to()) != Some(i)).collect();
        let mut unreachable = Vec::new();
        for (message, superseded) in messages.into_iter().zip(superseded) {
            let to = message.to();
            if superseded || to == 0 {
                continue;
            }
            let Some(peer) = peers.get(&to) else { continue };
            let is_snapshot = message.r#type() == MessageType::MsgSnap;
            if peer.sender.try_send(Outgoing(message)).is_err() {
                peer.numbers.sent_failures.fetch_add(1, Relaxed);
                if is_snapshot {
                    self.shared.incoming.snapshot_sent(to, false);
                }
                if !unreachable.contains(&to) {
                    unreachable.push(to);
                }
            }
        }
        for id in unreachable {
            self.shared.incoming.unreachable(id);
        }
    }

    /// The members as they are now: connects to new ones, lets go of those that are gone. Calling it again changes nothing.
    pub fn set_members<'a>(&self, members: impl IntoIterator<Item = &'a Member>) {
        self.change(|peers| {
            let mut gone: HashMap<u64, Handle> = peers.iter().map(|(id, peer)| (*id, peer.clone())).collect();
            for member in members {
                if member.id == self.shared.member_id {
                    self.shared.set_own_urls(&member.peer_urls);
                    continue;
                }
                let urls = parse(&member.peer_urls);
                match gone.remove(&member.id) {
                    Some(peer) if !peer.is_remote => peer.urls.set(urls),
                    remote => {
                        if let Some(remote) = remote {
                            self.end(&remote);
                        }
                        peers.insert(member.id, self.begin(member.id, urls, false));
                        tracing::info!(peer = hex(member.id), urls = ?member.peer_urls, "added a peer");
                    }
                }
            }
            for (id, peer) in gone.into_iter().filter(|(_, peer)| !peer.is_remote) {
                peers.remove(&id);
                self.end(&peer);
                tracing::info!(peer = hex(id), "removed a peer");
            }
        });
    }

    /// Remembers how to post to a sender that is no member as far as is known here.
    pub fn add_remote(&self, id: u64, peer_urls: &[String]) {
        let known = self.peers.load().contains_key(&id);
        if known || id == self.shared.member_id || id == 0 || self.shared.incoming.is_removed(id) {
            return;
        }
        let urls = parse(peer_urls);
        if urls.is_empty() {
            return;
        }
        self.change(|peers| {
            let remotes = peers.values().filter(|peer| peer.is_remote).count();
            if remotes < REMOTES_MAX && !peers.contains_key(&id) {
                peers.insert(id, self.begin(id, urls, true));
                tracing::info!(peer = hex(id), urls = ?peer_urls, "a sender that is no member yet");
            }
        });
    }

    /// Ends all connections. Messages sent afterwards are dropped.
    pub fn stop(&self) {
        self.change(|peers| {
            for (_, peer) in peers.drain() {
                self.end(&peer);
            }
        });
        *self.changing.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    pub(super) fn peer(&self, id: u64) -> Option<Handle> {
        self.peers.load().get(&id).cloned()
    }

    fn change(&self, change: impl FnOnce(&mut HashMap<u64, Handle>)) {
        let stopped = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if *stopped {
            return;
        }
        let mut peers = HashMap::clone(&self.peers.load());
        change(&mut peers);
        self.peers.store(Arc::new(peers));
    }

    fn begin(&self, id: u64, urls: Vec<Url>, is_remote: bool) -> Handle {
        // Kept for ever, as the registry's names are: members are few, and senders nobody knows are limited.
        let name: &'static str = Box::leak(format!("peer-{}", hex(id)).into_boxed_str());
        let (sender, inbox) = Inbox::new(name, INBOX_MAX, INBOX_BYTES_MAX);
        self.registry.add(&inbox.stats);
        let urls = Arc::new(Urls::new(urls));
        let numbers = self.shared.numbers.of(id);
        let parts = Parts {
            shared: self.shared.clone(),
            id,
            urls: urls.clone(),
            numbers: numbers.clone(),
            stats: inbox.stats.clone(),
            is_remote,
        };
        shell::spawn(&self.arbiter, inbox, true, move || Peer::start(parts));
        Handle { sender, numbers, urls, is_remote }
    }

    fn end(&self, peer: &Handle) {
        peer.sender.control(Control::Stop);
        self.registry.remove(&peer.sender.stats);
    }
}

impl Links for Transport {
    fn connected_since(&self, id: u64) -> Option<Instant> {
        self.peers.load().get(&id)?.numbers.status.since()
    }

    fn render_metrics(&self, out: &mut Text) {
        self.shared.numbers.render(out);
    }
}

fn is_append_answer(message: &Message) -> bool {
    message.r#type() == MessageType::MsgAppResp
}

/// Those that can be read: the others have been refused where they came from.
fn parse(urls: &[String]) -> Vec<Url> {
    urls.iter().filter_map(|url| Url::parse(url).ok()).collect()
}
