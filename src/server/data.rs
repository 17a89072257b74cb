//! The data directory at start: which of log and store are there, whether they fit, and what raft starts from.

use std::{fs, os::unix::fs::DirBuilderExt, sync::Arc};

use anyhow::{Context, bail};

use crate::{
    apply,
    config::Config,
    lease,
    pb::etcdserverpb::Metadata,
    raft::Recovered,
    snapshot::import,
    storage::{
        fjall::{FjallStorage, Options},
        layout::{self, StoreDir},
    },
    wal::{self, Wal},
};

use super::join;

#[derive(Clone, Copy, Debug)]
pub struct Ids {
    pub member: u64,
    pub cluster: u64,
}

pub struct Opened {
    pub ids: Ids,
    pub wal: Wal,
    pub recovered: Recovered,
    pub storage: Arc<FjallStorage>,
    pub core: apply::Core,
    /// Keeps other processes out of the store.
    pub lock: StoreDir,
}

pub async fn open(config: &Config) -> anyhow::Result<Opened> {
    let member_dir = config.member_path();
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&member_dir)
        .with_context(|| format!("cannot make the data directory {}", member_dir.display()))?;
    let data_dir = std::path::Path::new(&config.data_dir);
    if data_dir.join("proxy").exists() {
        bail!("the data directory {} holds a proxy's data; give --data-dir another one", config.data_dir);
    }
    layout::refuse_foreign(data_dir)?;
    let stores = StoreDir::open(data_dir)?;

    let mut options = wal::Options::new(config.wal_path());
    options.unsafe_no_fsync = config.unsafe_no_fsync;
    let disk = options.disk.clone();
    let log_exists = Wal::exists(&*disk, &options.dir)?;
    let had_store = stores.current()?.is_some();
    if !log_exists {
        let first = join::begin(config).await?;
        let metadata = Metadata { node_id: Some(first.ids.member), cluster_id: Some(first.ids.cluster) };
        Wal::create(options.clone(), &metadata, &first.entries, first.hard_state.as_ref())?.close()?;
    } else if !config.force_new_cluster {
        tracing::info!("the data directory has data: --initial-* and --discovery-* are ignored");
    }
    let (log, found) = Wal::open(options)?;
    let ids = Ids { member: found.metadata.node_id.unwrap_or(0), cluster: found.metadata.cluster_id.unwrap_or(0) };
    let compacted = (found.snapshot.index.unwrap_or(0), found.snapshot.term.unwrap_or(0));
    if compacted.0 > 0 && !had_store {
        // D-24
        bail!(
            "the log in {} begins after entry {}, so there was a store, but {} has none; restore the store or start \
             with an empty data directory as a new member",
            config.wal_path().display(),
            compacted.0,
            member_dir.display()
        );
    }
    import::settle(&stores, compacted.0)?;
    let storage = Arc::new(stores.open_current(&Options::default())?);
    let settings = apply::Settings {
        member_id: ids.member,
        min_lease_ttl: lease::min_ttl(config.election_ticks(), config.heartbeat_interval_ms),
        max_learners: usize::try_from(config.max_learners).unwrap_or(0),
        persist_lease_checkpoints: config.feature_gates.enabled("LeaseCheckpointPersist"),
        quota_bytes: config.quota(),
    };
    let core = apply::Core::open(storage.clone(), settings).context("cannot read the store")?;
    let applied = core.applied_index();
    let last = found.entries.last().and_then(|e| e.index).unwrap_or(0).max(compacted.0);
    if applied > last {
        bail!(
            "the store has applied entry {applied}, but the log in {} ends at {last}: the log was lost or replaced; \
             put it back, or start with an empty data directory as a new member",
            config.wal_path().display()
        );
    }
    if applied < compacted.0 {
        bail!(
            "the store has applied entry {applied} only, but the log in {} begins after {}: the store is older than \
             its log; put the newer store back, or start with an empty data directory as a new member",
            config.wal_path().display(),
            compacted.0
        );
    }
    let recovered = Recovered {
        compacted,
        entries: found.entries,
        hard_state: found.hard_state,
        conf_state: core.members().conf_state(),
        applied,
    };
    Ok(Opened { ids, wal: log, recovered, storage, core, lock: stores })
}
