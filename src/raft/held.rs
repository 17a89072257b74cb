//! Requests of other members that nobody can take yet: no leader is known, or it has committed nothing of its term.

use std::collections::VecDeque;

use raft::eraftpb as rs;

/// Messages kept; raft may lose any message, so more are dropped.
const MESSAGES_MAX: usize = 4096;
/// Bytes they may have; one message always has room.
const BYTES_MAX: usize = 64 << 20;

/// In order of arrival, with the tick of it.
#[derive(Default)]
pub struct Held {
    messages: VecDeque<(u64, rs::Message)>,
    bytes: usize,
}

impl Held {
    /// False if there was no room: it is lost.
    pub fn put(&mut self, tick: u64, message: rs::Message) -> bool {
        let bytes = self.bytes + size(&message);
        let fits = self.messages.len() < MESSAGES_MAX && (self.messages.is_empty() || bytes <= BYTES_MAX);
        if fits {
            self.bytes = bytes;
            self.messages.push_back((tick, message));
        }
        fits
    }

    /// Drops what came before `tick`.
    pub fn expire(&mut self, tick: u64) {
        while self.messages.front().is_some_and(|(since, _)| *since < tick)
            && let Some((_, message)) = self.messages.pop_front()
        {
            self.bytes -= size(&message);
        }
    }

    pub fn take(&mut self) -> impl Iterator<Item = rs::Message> + use<> {
        std::mem::take(self).messages.into_iter().map(|(_, message)| message)
    }
}

fn size(message: &rs::Message) -> usize {
    let entries = message.entries.iter().map(|entry| entry.data.len() + size_of::<rs::Entry>());
    size_of::<rs::Message>() + message.context.len() + entries.sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(bytes: usize) -> rs::Message {
        let entry = rs::Entry { data: vec![0; bytes].into(), ..Default::default() };
        rs::Message { entries: vec![entry].into(), ..Default::default() }
    }

    #[test]
    fn large_messages_are_held_up_to_their_bytes() {
        let mut held = Held::default();
        assert!(held.put(1, message(BYTES_MAX)), "one always has room");
        assert!(!held.put(1, message(1)));
        held.expire(2);
        assert_eq!(held.bytes, 0);
        let taken = (0..100).filter(|_| held.put(2, message(1 << 20))).count();
        assert_eq!(taken, 63, "64 MiB with what is beside the data");
        assert_eq!(held.take().count(), 63);
        assert_eq!(held.bytes, 0);
        assert!(held.put(3, message(1 << 20)));
    }

    #[test]
    fn small_messages_are_held_up_to_their_number() {
        let mut held = Held::default();
        assert_eq!((0..5_000).filter(|_| held.put(1, message(1))).count(), MESSAGES_MAX);
    }

    #[test]
    fn the_oldest_expire() {
        let mut held = Held::default();
        for tick in 1..=5 {
            held.put(tick, message(tick as usize));
        }
        held.expire(4);
        let left: Vec<usize> = held.take().map(|m| m.entries[0].data.len()).collect();
        assert_eq!(left, [4, 5]);
    }
}
