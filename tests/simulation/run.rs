//! One run from its plan to its verdict, and how a plan that fails is made small.

use std::{
    cell::Cell,
    collections::BTreeMap,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Once,
};

use actd::sim::{self, Bug};

use super::{
    client::Last,
    plan::{ELECTION, Plan, REQUEST_TIMEOUT, SECOND},
    watcher::Watcher,
    world::World,
};

/// Simulated time, calls and faults.
#[derive(Clone, Copy, Debug)]
pub struct Least(pub u64, pub u64, pub u64);

impl Default for Least {
    fn default() -> Self {
        Self(u64::MAX, u64::MAX, u64::MAX)
    }
}

/// Totals of one run or many.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub seeds: u64,
    pub simulated: u64,
    pub events: u64,
    pub calls: u64,
    pub faults: u64,
    pub entries: u64,
    pub checks: u64,
    pub watched: u64,
    /// Of the run that had the least of each.
    pub least: Least,
    pub marks: BTreeMap<&'static str, u64>,
    /// Of many runs the sum, whatever order they ended in.
    pub digest: u64,
}

impl Report {
    pub fn add(&mut self, other: &Report) {
        self.seeds += other.seeds;
        self.simulated += other.simulated;
        self.events += other.events;
        self.calls += other.calls;
        self.faults += other.faults;
        self.entries += other.entries;
        self.checks += other.checks;
        self.watched += other.watched;
        let (a, b) = (self.least, other.least);
        self.least = Least(a.0.min(b.0), a.1.min(b.1), a.2.min(b.2));
        for (branch, count) in &other.marks {
            *self.marks.entry(branch).or_default() += count;
        }
        self.digest = self.digest.wrapping_add(other.digest);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} seeds, {} s simulated, {} events, {} calls, {} faults, {} entries, {} answers and states compared, {} watch \
             events, digest {:016x}",
            self.seeds,
            self.simulated / SECOND,
            self.events,
            self.calls,
            self.faults,
            self.entries,
            self.checks,
            self.watched,
            self.digest
        )?;
        for (branch, count) in &self.marks {
            writeln!(f, "  {count:>8} × {branch}")?;
        }
        Ok(())
    }
}

/// Why a run failed.
#[derive(Clone, Debug)]
pub struct Failure {
    pub text: String,
    pub timeline: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text: String = self.text.chars().take(600).collect();
        f.write_str(text.trim_end())
    }
}

thread_local! {
    static IS_SIMULATED: Cell<bool> = const { Cell::new(false) };
    static PLACE: Cell<String> = const { Cell::new(String::new()) };
}

/// Panics in runs are results: they are told once, by who asked for the run.
pub fn quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if IS_SIMULATED.get() {
                PLACE.set(info.location().map(ToString::to_string).unwrap_or_default());
            } else {
                before(info);
            }
        }));
    });
}

/// Clients go on until so many calls were answered.
const LEAST_CALLS: u64 = 300;

/// How long leases may live when nobody keeps them: the longest time to live, an election, and a revocation that got lost.
const LEASES: u64 = 4 * SECOND + 2 * ELECTION + REQUEST_TIMEOUT + SECOND;

/// How long the cluster may take to heal when faults are over.
const HEAL: u64 = 40 * SECOND;

pub fn run(plan: &Plan, bug: Option<Bug>) -> Result<Report, Failure> {
    attempt(plan, bug, false)
}

fn attempt(plan: &Plan, bug: Option<Bug>, verbose: bool) -> Result<Report, Failure> {
    sim::seed(bug);
    let _ = sim::take_marks();
    IS_SIMULATED.set(true);
    let mut world = World::new(plan.clone(), verbose);
    let done = catch_unwind(AssertUnwindSafe(|| {
        world.begin_all();
        live(&mut world)
    }));
    IS_SIMULATED.set(false);
    sim::seed(None);
    let timeline = world.timeline.take().map(Vec::from).unwrap_or_default();
    if let Err(panic) = &done {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default();
        return Err(Failure { text: format!("{text} ({})", PLACE.take()), timeline });
    }
    let mut marks = sim::take_marks();
    for (branch, count) in &world.stats.marks {
        *marks.entry(branch).or_default() += count;
    }
    Ok(Report {
        seeds: 1,
        simulated: world.now,
        events: world.stats.events,
        calls: world.stats.calls,
        faults: world.stats.faults,
        entries: world.truth.executed,
        checks: world.truth.checked,
        watched: world.watchers.iter().map(|watcher| watcher.events).sum(),
        least: match done {
            Ok(true) => Least(world.now, world.stats.calls, world.stats.faults),
            _ => Least::default(),
        },
        marks,
        digest: world.digest(),
    })
}

/// False if it ended early.
fn live(world: &mut World) -> bool {
    let until = world.plan.until;
    world.run(until, |_| false);
    // Faults are over.
    world.is_calm = true;
    world.heal();
    world.say(|| "CALM: no more faults".to_owned());
    for m in 0..world.members.len() {
        world.members[m].disk.calm();
        if world.members[m].is_store_broken {
            // It has not been written since.
            world.crash(m, false);
        }
        if !world.is_up(m) && world.members[m].restart_at.is_none() {
            world.restart_after(m, 0);
        }
    }
    world.run(world.now + 2 * SECOND, |_| false);
    let busy = |world: &World| world.stats.calls >= LEAST_CALLS;
    if !reach(world, HEAL, busy, "clients do not get on") {
        return false;
    }
    if !reach(world, HEAL, World::is_whole, "lost members are not replaced") {
        return false;
    }
    let end = world.now + HEAL;
    world.is_closing = true;
    let left = |world: &World| end.saturating_sub(world.now);
    let is_quiet = reach(world, left(world), World::is_idle, "calls do not end")
        && reach(world, left(world), World::is_healed, "the cluster does not heal")
        && reach(world, REQUEST_TIMEOUT + SECOND, World::has_answered, "calls are not answered");
    if !is_quiet {
        return false;
    }
    let leases = |world: &World| world.is_healed() && world.truth.model.leases.is_empty();
    assert!(world.run(world.now + LEASES, leases), "leases do not run out: {:?}", world.truth.model.leases);
    // With few spare entries in the leader's log a snapshot may bring a member the effect of its write without the result.
    let tries = if world.plan.config.catch_up_entries < 10 { 3 } else { 1 };
    let mut failed = None;
    for _ in 0..tries {
        let lease = world.next_lease;
        world.next_lease += 10;
        // A learner may still become one.
        let voters = world.voters();
        failed = [Last::Grant, Last::Renew, Last::Revoke].into_iter().find_map(|last| {
            let asked = world.ask_everybody(&voters, last, lease);
            assert!(world.run(world.now + 10 * SECOND, World::is_idle), "calls do not end: {}", world.describe());
            asked.into_iter().find(|op| !world.ops[*op].is_ok)
        });
        if failed.is_none() {
            break;
        }
    }
    if let Some(op) = failed {
        panic!("all is well, and operation {op} at m{} fails", world.ops[op].member);
    }
    // Watchers take what is left, and come to life where they were cut off.
    world.run((world.now + SECOND).max(20 * SECOND), |_| false);
    let done = |world: &World| world.watchers.iter().all(|watcher| watcher.is_done(&world.truth.model));
    let all_told = world.run(world.now + HEAL, |world| world.is_healed() && world.is_whole() && done(world));
    if all_told && world.plan.config.progress_ms <= 1_000 {
        // Long enough for each to hear of progress by itself.
        world.watchers.iter_mut().for_each(Watcher::begin_quiet);
        world.run(world.now + 3 * SECOND, |_| false);
        world.is_reported = true;
    }
    // A member that was replaced late may still have been on its way.
    assert!(world.is_healed(), "the cluster does not stay healed: {}", world.describe());
    assert!(world.is_whole(), "a lost member is not replaced: {}", world.describe());
    world.finish();
    true
}

/// How a run may end early, and few do.
pub const ORPHAN: &str = "who stays never heard that it is alone";

/// Whether that comes to pass. If not, all is over for good where two became one and who stays never heard of it, and
/// a failure else.
fn reach(world: &mut World, within: u64, done: impl Fn(&World) -> bool, else_: &str) -> bool {
    let is_done = world.run(world.now + within, done);
    assert!(is_done || world.is_orphaned(), "{else_}: {}", world.describe());
    if !is_done {
        world.mark(ORPHAN);
        world.finish_refused();
    }
    is_done
}

/// The plan with as few faults as still fail, and what happened last in that run.
pub fn shrunk(plan: &Plan, bug: Option<Bug>) -> String {
    if std::env::var_os("SIM_NO_SHRINK").is_some() {
        return String::new();
    }
    let mut plan = plan.clone();
    let mut pieces = 2;
    while pieces <= 2 * plan.faults.len().max(1) {
        let size = plan.faults.len().div_ceil(pieces).max(1);
        let without = (0..plan.faults.len()).step_by(size).find_map(|from| {
            let mut smaller = plan.clone();
            smaller.faults.drain(from..(from + size).min(smaller.faults.len()));
            run(&smaller, bug).is_err().then_some(smaller)
        });
        match without {
            Some(smaller) => plan = smaller,
            None => pieces *= 2,
        }
    }
    let Err(failure) = attempt(&plan, bug, true) else { return "it does not fail again".to_owned() };
    let faults: Vec<String> = plan.faults.iter().map(ToString::to_string).collect();
    format!(
        "settings: {:?}\n\nfaults that are enough:\n{}\n\nwhat happened last:\n{}\n\n{}",
        plan.config,
        faults.join("\n"),
        failure.timeline.join("\n"),
        failure.text
    )
}
