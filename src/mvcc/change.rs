//! One change as apply made it, for watchers.

use std::sync::OnceLock;

use bytes::Bytes;

use super::{
    Revision,
    record::{RawEvent, RawKeyValue},
};

#[derive(Debug)]
pub struct Change {
    pub revision: Revision,
    pub key: Bytes,
    pub delete: bool,
    /// The put record; for a delete a record with only key and mod_revision.
    pub kv: RawKeyValue,
    /// Where the state before this change is stored; `None` for a creation.
    pub prev: Option<Revision>,
    event: OnceLock<RawEvent>,
    event_with_prev: OnceLock<RawEvent>,
}

impl Change {
    pub fn new(revision: Revision, key: Bytes, delete: bool, kv: RawKeyValue, prev: Option<Revision>) -> Self {
        Self { revision, key, delete, kv, prev, event: OnceLock::new(), event_with_prev: OnceLock::new() }
    }

    /// The event without the previous record, encoded once for all watchers.
    pub fn event(&self) -> &RawEvent {
        self.event.get_or_init(|| RawEvent::new(self.delete, &self.kv, None))
    }

    /// The event with the previous record, which `load` fetches; `None` from it (compacted away) leaves it out.
    pub fn event_with_prev(&self, load: impl FnOnce(Revision) -> Option<RawKeyValue>) -> &RawEvent {
        match self.prev {
            None => self.event(),
            Some(prev) => {
                self.event_with_prev.get_or_init(|| RawEvent::new(self.delete, &self.kv, load(prev).as_ref()))
            }
        }
    }
}
