//! The actor of one other member: decides the channel of each message for it and owns what these channels queue.
//!
//! Messages come from raft's thread into its inbox. It never waits: what a channel has no room for is dropped, counted and
//! reported as unreachable, once a turn. Beside it run the tasks that dial, post and probe; they end with it.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use tokio::task::JoinSet;

use super::{
    codec::Kind,
    metrics::PeerNumbers,
    post::{self, Pipeline, Target},
    probe::Prober,
    reader::Reader,
    size_of,
    status::Urls,
    stream::Queue,
    wire::Shared,
};
use crate::{
    actor::{
        Actor, Stats, Turn,
        shell::{Flow, vital},
        stats::Refusal,
    },
    pb::raftpb::{Message, MessageType},
};

/// A message for the other member.
pub struct Outgoing(pub Message);

impl crate::actor::Message for Outgoing {
    const KINDS: &'static [&'static str] = &["append", "snapshot", "other"];

    fn kind(&self) -> usize {
        match self.0.r#type() {
            MessageType::MsgApp => 0,
            MessageType::MsgSnap => 1,
            _ => 2,
        }
    }

    fn bytes(&self) -> usize {
        size_of(&self.0)
    }
}

pub enum Control {
    /// The other member has dialled a stream.
    Dialled(Kind, Queue),
    /// The connection of a stream has ended.
    Ended(Kind),
    Stop,
}

/// What a peer actor is made of.
pub struct Parts {
    pub shared: Arc<Shared>,
    pub id: u64,
    pub urls: Arc<Urls>,
    pub numbers: Arc<PeerNumbers>,
    pub stats: Arc<Stats>,
    /// Not a member as far as is known here: only posts go to it.
    pub is_remote: bool,
}

pub struct Peer {
    shared: Arc<Shared>,
    id: u64,
    numbers: Arc<PeerNumbers>,
    stats: Arc<Stats>,
    append: Option<Queue>,
    message: Option<Queue>,
    pipeline: Pipeline,
    target: Target,
    /// Something was lost in this turn.
    lost: bool,
    /// Aborted when this is dropped.
    tasks: JoinSet<()>,
}

impl Peer {
    /// Starts its tasks too: must be called on the arbiter it runs on.
    pub fn start(parts: Parts) -> Self {
        let Parts { shared, id, urls, numbers, stats, is_remote } = parts;
        let target = Target { shared: shared.clone(), numbers: numbers.clone(), urls: urls.clone(), id };
        let (pipeline, end) = post::pipeline();
        let mut tasks = JoinSet::new();
        for _ in 0..post::SENDERS {
            // Not aborted: what is queued when a sender becomes a member still goes out.
            actix_rt::spawn(vital("peer pipeline", end.clone().run(target.clone())));
        }
        if !is_remote {
            for kind in [Kind::Append, Kind::Message] {
                let (shared, numbers, urls) = (shared.clone(), numbers.clone(), urls.clone());
                tasks.spawn(vital("peer stream", Reader { shared, numbers, urls, id, kind }.run()));
            }
            let prober = Prober { shared: shared.clone(), numbers: numbers.clone(), urls, id };
            tasks.spawn(vital("peer prober", prober.run()));
        }
        Self { shared, id, numbers, stats, append: None, message: None, pipeline, target, lost: false, tasks }
    }

    fn send(&mut self, message: Message) -> bool {
        let stream = match message.r#type() {
            MessageType::MsgApp => self.append.as_ref().or(self.message.as_ref()),
            _ => self.message.as_ref(),
        };
        match stream {
            Some(queue) => queue.put(message),
            None => self.pipeline.put(message),
        }
    }

    fn send_database(&mut self, order: Message) {
        while self.tasks.try_join_next().is_some() {}
        match self.shared.snapshots.clone().try_acquire_owned() {
            Ok(permit) => {
                let target = self.target.clone();
                self.tasks.spawn(vital("peer snapshot", async move {
                    let _permit = permit;
                    target.send_database(order).await;
                }));
            }
            Err(_) => {
                self.drop_one();
                self.shared.incoming.snapshot_sent(self.id, false);
            }
        }
    }

    fn drop_one(&mut self) {
        self.lost = true;
        self.numbers.sent_failures.fetch_add(1, Relaxed);
        self.stats.refuse(Refusal::Dropped);
    }

    fn stream(&mut self, kind: Kind) -> &mut Option<Queue> {
        match kind {
            Kind::Append => &mut self.append,
            Kind::Message => &mut self.message,
        }
    }
}

impl Actor for Peer {
    type Message = Outgoing;
    type Control = Control;

    fn on_message(&mut self, Outgoing(message): Outgoing, _: &Turn) {
        if message.r#type() == MessageType::MsgSnap {
            self.send_database(message);
        } else if !self.send(message) {
            self.drop_one();
        }
    }

    fn on_control(&mut self, control: Control, _: &Turn) -> Flow {
        match control {
            Control::Dialled(kind, queue) => {
                self.numbers.status.connected();
                // An older one ends here.
                *self.stream(kind) = Some(queue);
            }
            Control::Ended(kind) => {
                let stream = self.stream(kind);
                // Else it is the end of one that was replaced.
                if stream.as_ref().is_some_and(Queue::is_broken) {
                    *stream = None;
                    self.numbers.status.disconnected();
                    self.lost = true;
                }
            }
            Control::Stop => return Flow::Stop,
        }
        Flow::Continue
    }

    fn on_turn_end(&mut self, _: &Turn) {
        if std::mem::take(&mut self.lost) {
            self.shared.incoming.unreachable(self.id);
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.numbers.status.disconnected();
    }
}
