//! The actor kit: what every actor has in common, in one place.
//!
//! An actor is a core (plain struct, deterministic) in a thin shell. The kit gives the shell
//! * a bounded **data lane** drained in batches, and a small **control lane** drained first in every turn ([`inbox`]),
//! * a **gate** whose permits (a slot and some bytes) travel inside messages ([`gate`]),
//! * **counters and live controls** ([`stats`]), listed in one [`registry::Registry`] that exporters read,
//! * a place to run ([`placement`]), and a [`watchdog`] that tells who is stuck.
//!
//! Nothing here knows what messages mean. This is the only module that may call actix's `do_send`, because it is the
//! only one that knows that at most one nudge is outstanding.

pub mod gate;
pub mod inbox;
pub mod placement;
pub mod registry;
pub mod shell;
pub mod stats;
#[cfg(test)]
mod tests;
pub mod watchdog;

pub use gate::{Gate, Permit};
pub use inbox::{Inbox, Sender};
pub use registry::Registry;
pub use shell::{Actor, Turn};
pub use stats::{Controls, Stats};

/// A message on a data lane.
pub trait Message: Send + 'static {
    /// Names of the kinds of this message, for counters.
    const KINDS: &'static [&'static str];

    /// Index into [`Message::KINDS`].
    fn kind(&self) -> usize {
        0
    }

    /// Bytes this message keeps in memory beside its own size.
    fn bytes(&self) -> usize {
        0
    }
}
