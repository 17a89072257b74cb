//! All actors and gates of the process, for exporters and the watchdog.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Gate, Stats};

#[derive(Clone, Default)]
pub struct Registry(Arc<Mutex<Listed>>);

#[derive(Default)]
struct Listed {
    actors: Vec<Arc<Stats>>,
    gates: Vec<Gate>,
}

impl Registry {
    pub fn add(&self, actor: &Arc<Stats>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).actors.push(actor.clone());
    }

    /// For an actor that has ended while the process goes on.
    pub fn remove(&self, actor: &Arc<Stats>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).actors.retain(|listed| !Arc::ptr_eq(listed, actor));
    }

    pub fn add_gate(&self, gate: &Gate) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).gates.push(gate.clone());
    }

    pub fn actors(&self) -> Vec<Arc<Stats>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).actors.clone()
    }

    pub fn gates(&self) -> Vec<Gate> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).gates.clone()
    }
}
