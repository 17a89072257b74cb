//! From changes to the responses of one watcher: which form of an event, and when a response is split.

use prost::{Message, encoding};

use super::history::History;
use crate::{
    mvcc::{change::Change, record::RawEvent},
    pb::etcdserverpb::WatchResponse,
    storage,
};

/// The encoded event of `change`, with the record before it if the watcher asked for that.
///
/// What was before a change is readable at the revision before it, so only while that is not below the compact
/// revision. The record itself may be older than the compaction, which keeps the newest one of each key.
pub(super) fn event(change: &Change, prev_kv: bool, history: &mut dyn History) -> Result<RawEvent, storage::Error> {
    if !prev_kv {
        return Ok(change.event().clone());
    }
    let readable = change.revision.main > history.view().compact_revision;
    let mut failed = None;
    let event = change.event_with_prev(|prev| {
        if !readable {
            return None;
        }
        history.record(prev).unwrap_or_else(|error| {
            failed = Some(error);
            None
        })
    });
    match failed {
        None => Ok(event.clone()),
        Some(error) => Err(error),
    }
}

/// Parts a response too large for its client: each fragment stays below `fragment_bytes` unless a single event is not.
pub(super) fn fragments(whole: WatchResponse, fragment_bytes: usize) -> Vec<WatchResponse> {
    let empty = WatchResponse {
        events: Vec::new(),
        fragment: true,
        header: whole.header,
        watch_id: whole.watch_id,
        ..Default::default()
    };
    let mut fragments = Vec::new();
    let mut fragment = empty.clone();
    let mut bytes = empty.encoded_len();
    for event in whole.events {
        let event_bytes = encoding::message::encoded_len(EVENTS_TAG, &event);
        if !fragment.events.is_empty() && bytes + event_bytes >= fragment_bytes {
            fragments.push(std::mem::replace(&mut fragment, empty.clone()));
            bytes = empty.encoded_len();
        }
        bytes += event_bytes;
        fragment.events.push(event);
    }
    fragment.fragment = false;
    fragments.push(fragment);
    fragments
}

/// Number of the field `WatchResponse.events`.
const EVENTS_TAG: u32 = 11;
