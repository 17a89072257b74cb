//! The shell: runs an actor's core on an arbiter, batch by batch.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use actix::{ActorContext, AsyncContext, Context, Handler};

use super::{
    Inbox, Message,
    inbox::{Nudge, Queued},
};

/// An actor's core as the shell sees it.
pub trait Actor: Unpin + 'static {
    type Message: Message;
    type Control: Send + 'static;

    /// One message of the data lane.
    fn on_message(&mut self, message: Self::Message, turn: &Turn);

    /// One message of the control lane; comes before all data of the turn.
    fn on_control(&mut self, message: Self::Control, turn: &Turn) -> Flow;

    /// After the messages of a turn: do what is cheaper once per batch. Also called when a turn had no data.
    fn on_turn_end(&mut self, turn: &Turn);

    /// Takes no more data while false; control goes on, and any wake-up asks again.
    fn ready(&mut self) -> bool {
        true
    }

    /// True asks for another turn although no message may come: work is left that was put off.
    fn has_work(&self) -> bool {
        false
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    Continue,
    /// Ends the actor after this turn.
    Stop,
}

/// What a core may know of the turn it is in.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// When the turn began: the only clock a core sees.
    pub now: Instant,
}

/// Starts `actor` on `arbiter`. If `vital`, a panic in it ends the process: nothing may be acknowledged after that.
pub fn spawn<A, F>(arbiter: &actix_rt::ArbiterHandle, inbox: Inbox<A::Message, A::Control>, vital: bool, make: F)
where
    A: Actor,
    F: FnOnce() -> A + Send + 'static,
{
    let waker = inbox.waker.clone();
    let addr = <Shell<A> as actix::Actor>::start_in_arbiter(arbiter, move |_| Shell { inbox, core: make(), vital });
    // The first nudge may have been asked for before there was anyone to send it to.
    let _ = waker.target.set(addr.recipient());
    waker.scheduled.store(false, Ordering::Release);
    waker.wake();
}

struct Shell<A: Actor> {
    /// Dropped before the core: once the core is gone, senders are refused.
    inbox: Inbox<A::Message, A::Control>,
    core: A,
    vital: bool,
}

impl<A: Actor> actix::Actor for Shell<A> {
    type Context = Context<Self>;
}

impl<A: Actor> Handler<Nudge> for Shell<A> {
    type Result = ();

    fn handle(&mut self, _: Nudge, ctx: &mut Context<Self>) {
        let _guard = OnPanic { name: self.inbox.stats.name, vital: self.vital };
        // Before looking at the lanes: a message pushed from now on brings its own nudge.
        self.inbox.waker.scheduled.store(false, Ordering::Release);
        match self.turn(Instant::now()) {
            Next::Stop => ctx.stop(),
            Next::Again => {
                if !self.inbox.waker.scheduled.swap(true, Ordering::AcqRel) {
                    ctx.notify(Nudge);
                }
            }
            Next::Wait => {}
        }
    }
}

enum Next {
    Stop,
    Again,
    Wait,
}

impl<A: Actor> Shell<A> {
    fn turn(&mut self, now: Instant) -> Next {
        let stats = self.inbox.stats.clone();
        let turn = Turn { now };
        stats.turn_begins(now);

        let mut flow = Flow::Continue;
        for control in self.inbox.control.try_iter() {
            if self.core.on_control(control, &turn) == Flow::Stop {
                flow = Flow::Stop;
            }
        }

        let paused = stats.controls.paused.load(Ordering::Relaxed);
        let mut batch = Batch::new(now);
        let mut more = false;
        if !paused && flow == Flow::Continue {
            let batch_max = stats.controls.batch_max.load(Ordering::Relaxed);
            let turn_max = Duration::from_micros(stats.controls.turn_micros_max.load(Ordering::Relaxed));
            loop {
                if batch.messages >= batch_max || !self.core.ready() {
                    // Not ready: whoever makes room wakes us.
                    more = batch.messages >= batch_max;
                    break;
                }
                // The clock is read once per 16 messages: a turn may run over by at most that many.
                if batch.messages % 16 == 15 && now.elapsed() > turn_max {
                    more = true;
                    break;
                }
                let Ok(Queued { message, at }) = self.inbox.data.try_recv() else { break };
                stats.release(message.bytes());
                let kind = message.kind();
                batch.next(&stats, kind, at);
                self.core.on_message(message, &turn);
            }
        }
        batch.close(&stats);
        self.core.on_turn_end(&turn);
        stats.turn_ends(batch.messages, now.elapsed());
        match flow {
            Flow::Stop => Next::Stop,
            Flow::Continue if more || self.core.has_work() => Next::Again,
            Flow::Continue => Next::Wait,
        }
    }
}

/// An actor without a thread: its owner says when it takes a turn, and what time it is. For simulations and tests.
pub struct Stepped<A: Actor>(Shell<A>);

impl<A: Actor> Stepped<A> {
    /// No turn ends by the real clock: what is in it depends on what was sent alone.
    pub fn new(inbox: Inbox<A::Message, A::Control>, core: A) -> Self {
        inbox.stats.controls.turn_micros_max.store(u64::MAX, Ordering::Relaxed);
        Self(Shell { inbox, core, vital: false })
    }

    pub fn core(&self) -> &A {
        &self.0.core
    }

    /// True if a turn would find something to do.
    pub fn is_due(&self) -> bool {
        let Shell { inbox, core, .. } = &self.0;
        !inbox.control.is_empty() || !inbox.data.is_empty() || core.has_work()
    }

    /// One turn, as on an arbiter.
    pub fn turn(&mut self, now: Instant) -> Flow {
        match self.0.turn(now) {
            Next::Stop => Flow::Stop,
            Next::Again | Next::Wait => Flow::Continue,
        }
    }
}

/// Wait and service times of a batch; the clock is read when the kind of message changes, not for each message.
struct Batch {
    start: Instant,
    mark: Instant,
    kind: Option<usize>,
    run: u64,
    waited: Duration,
    messages: usize,
}

impl Batch {
    fn new(start: Instant) -> Self {
        Self { start, mark: start, kind: None, run: 0, waited: Duration::ZERO, messages: 0 }
    }

    fn next(&mut self, stats: &super::Stats, kind: usize, queued: Instant) {
        if self.kind != Some(kind) {
            self.close(stats);
            self.kind = Some(kind);
            stats.works_on(kind, queued);
        }
        self.run += 1;
        self.messages += 1;
        self.waited += self.start.saturating_duration_since(queued);
    }

    fn close(&mut self, stats: &super::Stats) {
        if let Some(kind) = self.kind.take() {
            let now = Instant::now();
            stats.served(kind, self.run, self.waited, now - self.mark);
            self.mark = now;
            self.run = 0;
            self.waited = Duration::ZERO;
        }
    }
}

/// A task beside actors without which the member is crippled: a panic in it ends the process.
pub async fn vital<F: Future>(name: &'static str, task: F) -> F::Output {
    let _guard = OnPanic { name, vital: true };
    task.await
}

struct OnPanic {
    name: &'static str,
    vital: bool,
}

impl Drop for OnPanic {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        if self.vital {
            tracing::error!(
                actor = self.name,
                "actor panicked; ending the process so that nothing more is acknowledged"
            );
            std::process::exit(2);
        }
        tracing::error!(actor = self.name, "actor panicked; the member goes on without it");
    }
}
