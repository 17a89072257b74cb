//! Watch: who hears of which change, and when.
//!
//! A [`Hub`] is the core of one actor, one per RPC runtime, and owns every watcher of that runtime's streams. It is a
//! plain deterministic struct: no clock (times come in as milliseconds), no I/O but reads through [`History`], no locks.
//! Here are neither sockets nor permission checks nor the final status of a stream (leader loss, shutdown): the
//! shell has those.
//!
//! # Positions
//!
//! The hub is at revision *H*: of everything up to H each watcher has been sent what it wants, unless the watcher is
//! *behind*. A watcher whose next revision is above H needs nothing but the messages to come, so it is fed from them;
//! one whose next revision is at or below H is behind and reads history until its next revision is above H. That one
//! comparison decides at creation, after a lag, after a catch-up and after a jump of the revision. Deliveries skip
//! what is below a watcher's next revision, so a catch-up may run ahead of the messages without repeating anything.
//!
//! # Calling it
//!
//! * [`Hub::on_published`] once per published view, in order. apply swaps the view *before* it sends the message, so
//!   that [`History::view`] is never older than the hub. The first message tells a new hub where it starts.
//!   A message whose changes do not lead from H to its view (the first one, or one after a snapshot
//!   install) puts every watcher behind that wanted something in between.
//! * [`Hub::open_stream`], [`Hub::on_request`], [`Hub::close_stream`] as clients come, ask and go. Stop reading the
//!   requests of a stream while [`Hub::accepts_requests`] is false: its client does not take what it asked for.
//! * [`Hub::on_taken`] when the transport took responses out of a stream's queue.
//! * [`Hub::on_tick`] at or after [`Hub::next_tick`].
//! * [`Hub::catch_up`] while it says that there is more, and after each of the calls above. A step reads
//!   a bounded piece of history for one watcher; the shell takes as many steps as its turn has time for.
//!
//! Responses are appended to `out` in the order in which they go to their streams. The shell forwards all of them, in
//! that order, before it calls the hub again; a stream's queue in the shell needs no bound of its own, the hub
//! stops filling it at its budget. A storage error from any call ends the process.
//!
//! # Bounds
//!
//! Queued bytes of one stream: the budget, plus one response that did not fit (history reads are cut at
//! [`HubConfig::catch_up_bytes`], but a revision is never cut), plus small answers: one per request read, and one
//! progress report per watcher and tick.

mod fanout;
mod history;
mod hub;
mod key_index;
mod port;
mod shell;
mod slab;
mod stream;
mod watcher;

#[cfg(test)]
mod model;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

pub use history::{History, HistoryError, HistoryLimit, HistoryPage, StoreHistory};
pub use hub::{Hub, HubConfig, Outgoing, Published, Stats};
pub use port::{Client, Ends, PUBLISHED_MAX, Port, connect};
pub use shell::{Requests, Responses, run};
pub use stream::StreamId;
pub use watcher::watched_range;
