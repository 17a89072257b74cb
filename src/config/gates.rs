//! Feature gates: named switches for behaviour that is new (alpha, off) or nearly settled (beta, on).

use super::syntax::parse_bool;
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Alpha,
    Beta,
}

impl Stage {
    pub fn name(self) -> &'static str {
        match self {
            Stage::Alpha => "ALPHA",
            Stage::Beta => "BETA",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate {
    pub name: &'static str,
    pub stage: Stage,
    pub default: bool,
    pub help: &'static str,
    /// Why setting it changes nothing, if so.
    pub idle: Option<&'static str>,
}

const fn gate(name: &'static str, stage: Stage, default: bool, help: &'static str) -> Gate {
    Gate { name, stage, default, help, idle: None }
}

impl Gate {
    const fn idle(mut self, why: &'static str) -> Self {
        self.idle = Some(why);
        self
    }
}

pub const ALL_ALPHA: &str = "AllAlpha";
pub const ALL_BETA: &str = "AllBeta";
pub const LEASE_CHECKPOINT: &str = "LeaseCheckpoint";
pub const LEASE_CHECKPOINT_PERSIST: &str = "LeaseCheckpointPersist";

pub static GATES: &[Gate] = &[
    gate(ALL_ALPHA, Stage::Alpha, false, "sets every alpha gate that is not set by its own name"),
    gate(ALL_BETA, Stage::Beta, false, "sets every beta gate that is not set by its own name"),
    gate(
        "CompactHashCheck",
        Stage::Alpha,
        false,
        "the leader compares the hashes members computed while compacting and raises CORRUPT where they differ",
    ),
    gate(
        "FastLeaseKeepAlive",
        Stage::Beta,
        true,
        "a keep-alive of a lease the leader knows does not wait for entries still to be applied",
    ),
    gate(
        "InitialCorruptCheck",
        Stage::Alpha,
        false,
        "before serving, a restarted member compares its data with its peers and stops on a difference",
    ),
    gate(
        LEASE_CHECKPOINT,
        Stage::Alpha,
        false,
        "the leader replicates what is left of each lease, so that a new leader does not start them afresh",
    ),
    gate(
        LEASE_CHECKPOINT_PERSIST,
        Stage::Alpha,
        false,
        "the replicated remainders survive a restart; needs LeaseCheckpoint",
    ),
    gate("PriorityRequest", Stage::Alpha, false, "lets lease revocations through when other proposals are refused"),
    gate(
        "SetMemberLocalAddr",
        Stage::Alpha,
        false,
        "dial peers from the first address in the advertised peer URLs that is not loopback",
    ),
    gate(
        "StopGRPCServiceOnDefrag",
        Stage::Alpha,
        false,
        "the health service answers NOT_SERVING while this member defragments",
    )
    .idle("nothing: a defragmentation holds up nobody"),
    gate(
        "TxnModeWriteWithSharedBuffer",
        Stage::Beta,
        true,
        "internal to etcd's storage: write transactions read through the shared buffer",
    )
    .idle(super::flags::BBOLT),
];

/// Which gates are open. Only gates that were set, by name or through AllAlpha and AllBeta, are stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FeatureGates {
    set: BTreeMap<&'static str, bool>,
}

impl FeatureGates {
    /// # Panics
    /// If no gate has that name.
    pub fn enabled(&self, name: &str) -> bool {
        let gate = find(name).unwrap_or_else(|| panic!("no feature gate is called {name}"));
        self.set.get(gate.name).copied().unwrap_or(gate.default)
    }

    /// Gates that were set and change nothing.
    pub fn idle(&self) -> impl Iterator<Item = (&'static str, &'static str)> + '_ {
        let is_changed = |gate: &&Gate| self.enabled(gate.name) != gate.default;
        GATES.iter().filter(is_changed).filter_map(|gate| Some((gate.name, gate.idle?)))
    }

    /// Every gate and its state, for the metric that shows them.
    pub fn states(&self) -> impl Iterator<Item = (&'static Gate, bool)> + '_ {
        GATES.iter().map(|gate| (gate, self.enabled(gate.name)))
    }

    /// Applies `A=true,B=false` on top of what is set already. Nothing changes on an error.
    pub fn apply(&mut self, text: &str) -> Result<(), String> {
        let mut named = BTreeMap::new();
        for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').ok_or_else(|| format!("missing bool value for {pair}"))?;
            let (name, value) = (name.trim(), value.trim());
            let open = parse_bool(value).ok_or_else(|| {
                format!("invalid value of {name}={value}, err: strconv.ParseBool: parsing {value:?}: invalid syntax")
            })?;
            named.insert(name, open);
        }
        let mut set = self.set.clone();
        for (name, open) in &named {
            let gate = find(name).ok_or_else(|| format!("unrecognized feature gate: {name}"))?;
            set.insert(gate.name, *open);
        }
        for (all, stage) in [(ALL_ALPHA, Stage::Alpha), (ALL_BETA, Stage::Beta)] {
            if let Some(open) = named.get(all) {
                for gate in GATES.iter().filter(|gate| gate.stage == stage) {
                    set.entry(gate.name).or_insert(*open);
                }
            }
        }
        self.set = set;
        Ok(())
    }
}

fn find(name: &str) -> Option<&'static Gate> {
    GATES.iter().find(|gate| gate.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gates(text: &str) -> Result<FeatureGates, String> {
        let mut gates = FeatureGates::default();
        gates.apply(text)?;
        Ok(gates)
    }

    #[test]
    fn names_and_values_are_trimmed() {
        let gates = gates(" LeaseCheckpoint = true , FastLeaseKeepAlive=F,").expect("valid");
        assert!(gates.enabled("LeaseCheckpoint"));
        assert!(!gates.enabled("FastLeaseKeepAlive"));
        assert!(!gates.enabled("CompactHashCheck"));
    }

    #[test]
    fn all_alpha_spares_gates_set_by_name() {
        let gates = gates("LeaseCheckpoint=false,AllAlpha=true,AllBeta=false").expect("valid");
        let open: Vec<_> = gates.states().filter(|(_, open)| *open).map(|(gate, _)| gate.name).collect();
        assert!(!open.contains(&"LeaseCheckpoint"));
        assert!(!open.contains(&"FastLeaseKeepAlive"));
        assert!(open.contains(&"PriorityRequest") && open.contains(&"LeaseCheckpointPersist"));
    }

    #[test]
    fn errors_name_the_gate_and_change_nothing() {
        let mut kept = FeatureGates::default();
        for (text, error) in [
            ("LeaseCheckpoint", "missing bool value for LeaseCheckpoint"),
            (
                "LeaseCheckpoint=x",
                r#"invalid value of LeaseCheckpoint=x, err: strconv.ParseBool: parsing "x": invalid syntax"#,
            ),
            ("LeaseCheckpoint=true,Foo=true", "unrecognized feature gate: Foo"),
        ] {
            assert_eq!(kept.apply(text).unwrap_err(), error);
            assert_eq!(kept, FeatureGates::default());
        }
    }
}
