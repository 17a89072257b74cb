//! Streams whose caller wants a leader (`hasleader: true`): they end when there has been none for a while (W-48).

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::Frame;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};
use tonic::{Status, body::Body};

use super::status;
use crate::raft;

/// Looks in a row, one per election timeout, that find no leader.
const LOOKS: u32 = 3;

/// The body of an answer, ended in place of the handler once no leader has been seen for too long.
pub struct WhileLed {
    body: Option<Body>,
    raft: Arc<raft::Status>,
    looks: Interval,
    without: u32,
}

impl WhileLed {
    pub fn new(body: Body, raft: Arc<raft::Status>, election_timeout: Duration) -> Self {
        let mut looks = interval_at(Instant::now() + election_timeout, election_timeout);
        // A runtime that stood still has not looked: it must not count late looks as looks.
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { body: Some(body), raft, looks, without: 0 }
    }
}

impl http_body::Body for WhileLed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        if let Poll::Ready(frame) = Pin::new(body).poll_frame(cx) {
            return Poll::Ready(frame);
        }
        loop {
            ready!(self.looks.poll_tick(cx));
            self.without = if self.raft.read().leader == 0 { self.without + 1 } else { 0 };
            if self.without == LOOKS {
                self.body = None;
                let mut trailers = HeaderMap::new();
                status::no_leader().add_header(&mut trailers)?;
                return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
            }
        }
    }
}
