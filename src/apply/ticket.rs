//! Who waits for a request, and how the answer gets back to it.
//!
//! Answers of one batch go to each RPC runtime in one message, so that a batch costs one wake-up per runtime and not
//! one per request.

use std::time::Instant;

use tokio::sync::oneshot;

use super::{Error, Response};
use crate::{actor::Permit, pb::etcdserverpb::InternalRaftRequest};

pub type Outcome = Result<Response, Error>;

/// The place in an RPC runtime where one answer is waited for.
#[derive(Debug)]
pub struct Reply {
    runtime: usize,
    slot: oneshot::Sender<Outcome>,
}

/// A request's way through raft and apply.
#[derive(Debug)]
pub struct Ticket {
    /// The request as the handler decoded it, so that apply need not decode the entry again.
    pub request: Box<InternalRaftRequest>,
    pub reply: Reply,
    /// Who still waits without a place in the log at this time is told that the request timed out.
    pub deadline: Instant,
    /// Held until the work is done.
    pub permit: Permit,
}

/// Answers for one runtime.
type Answers = Vec<(oneshot::Sender<Outcome>, Outcome)>;

/// The delivery queue of each RPC runtime.
#[derive(Clone, Debug)]
pub struct Replies(Vec<flume::Sender<Answers>>);

/// The receiving end in one runtime.
pub struct Deliveries(flume::Receiver<Answers>);

impl Replies {
    /// One queue for each of `runtimes`. Not bounded: each answer belongs to a permit.
    pub fn new(runtimes: usize) -> (Self, Vec<Deliveries>) {
        let (tx, rx) = (0..runtimes).map(|_| flume::unbounded()).map(|(tx, rx)| (tx, Deliveries(rx))).unzip();
        (Self(tx), rx)
    }

    /// Starts a batch of answers.
    pub fn batch(&self) -> Batch {
        Batch { replies: self.clone(), answers: self.0.iter().map(|_| Vec::new()).collect() }
    }

    pub fn send_one(&self, reply: Reply, outcome: Outcome) {
        let _ = self.0[reply.runtime].send(vec![(reply.slot, outcome)]);
    }
}

/// Answers gathered until the batch they belong to is visible.
pub struct Batch {
    replies: Replies,
    answers: Vec<Answers>,
}

impl Batch {
    pub fn add(&mut self, reply: Reply, outcome: Outcome) {
        self.answers[reply.runtime].push((reply.slot, outcome));
    }

    pub fn send(&mut self) {
        for (queue, answers) in self.replies.0.iter().zip(&mut self.answers) {
            if !answers.is_empty() {
                // A runtime that is gone has nobody who waits.
                let _ = queue.send(std::mem::take(answers));
            }
        }
    }
}

impl Deliveries {
    /// Runs in the runtime: hands each answer to who waits for it.
    pub async fn deliver(self) {
        while let Ok(answers) = self.0.recv_async().await {
            hand_out(answers);
        }
    }

    /// Hands out what is there.
    pub fn deliver_now(&self) {
        self.0.try_iter().for_each(hand_out);
    }
}

fn hand_out(answers: Answers) {
    for (slot, outcome) in answers {
        let _ = slot.send(outcome);
    }
}

impl Reply {
    pub fn new(runtime: usize) -> (Self, oneshot::Receiver<Outcome>) {
        let (slot, receiver) = oneshot::channel();
        (Self { runtime, slot }, receiver)
    }

    /// Answers at once, past the batches: for tests and for who has no runtime.
    pub fn answer(self, outcome: Outcome) {
        let _ = self.slot.send(outcome);
    }

    /// True if the caller has gone away.
    pub fn is_abandoned(&self) -> bool {
        self.slot.is_closed()
    }
}
