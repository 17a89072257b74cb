//! Tells which actor is stuck: one look a second at what each is doing and for how long.

use std::time::{Duration, Instant};

use super::Registry;

/// A turn longer than this is worth a line.
const STUCK: Duration = Duration::from_secs(1);

/// Runs until the process ends.
pub async fn watch(registry: Registry) {
    let mut every = tokio::time::interval(STUCK);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        for (name, doing, for_) in stuck(&registry, Instant::now()) {
            tracing::warn!(actor = name, doing, seconds = for_.as_secs_f64(), "actor is stuck");
        }
    }
}

/// Actors that have been in one turn for too long.
pub fn stuck(registry: &Registry, now: Instant) -> Vec<(&'static str, &'static str, Duration)> {
    registry
        .actors()
        .iter()
        .filter_map(|a| a.busy(now).map(|(doing, since)| (a.name, doing, since)))
        .filter(|(_, _, since)| *since > STUCK)
        .collect()
}
