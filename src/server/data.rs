//! The data directory at start: which of log and store are there, whether they fit, and what raft starts from.

use std::{fs, os::unix::fs::DirBuilderExt, sync::Arc};

use anyhow::{Context, bail};
use prost::Message;

use crate::{
    apply,
    cluster::{Change, Member, Members, bootstrap, ids::hex},
    config::{Config, ETCD_VERSION},
    lease,
    pb::{
        etcdserverpb::Metadata,
        raftpb::{ConfChange, Entry, EntryType},
    },
    raft::Recovered,
    snapshot::import,
    storage::{
        StoreInUse, WriteBatch,
        fjall::Options,
        layout::{self, StoreDir},
    },
    wal::{self, Wal},
};

use super::{Removed, join};

#[derive(Clone, Copy, Debug)]
pub struct Ids {
    pub member: u64,
    pub cluster: u64,
}

pub struct Opened {
    pub ids: Ids,
    pub wal: Wal,
    pub recovered: Recovered,
    pub storage: Arc<StoreInUse>,
    pub core: apply::Core,
    pub settings: apply::Settings,
    /// Keeps other processes out of the store.
    pub stores: StoreDir,
    /// Members of a running cluster that this one joins; it learns of them by the log later.
    pub remotes: Vec<Member>,
}

pub async fn open(config: &Config, store: &Options) -> anyhow::Result<Opened> {
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
    let mut remotes = Vec::new();
    if !log_exists {
        let first = join::begin(config).await?;
        let metadata = Metadata { node_id: Some(first.ids.member), cluster_id: Some(first.ids.cluster) };
        Wal::create(options.clone(), &metadata, &first.entries, first.hard_state.as_ref())?.close()?;
        remotes = first.remotes;
    } else if !config.force_new_cluster {
        tracing::info!("the data directory has data: --initial-* and --discovery-* are ignored");
    }
    let (mut log, mut found) = Wal::open(options)?;
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
    let storage = Arc::new(StoreInUse::new(stores.open_current(store)?));
    let learners_max = usize::try_from(config.max_learners).unwrap_or(0);
    let settings = apply::Settings {
        member_id: ids.member,
        release: ETCD_VERSION.parse().context("the own version is one")?,
        min_lease_ttl: lease::min_ttl(config.election_ticks(), config.heartbeat_interval_ms),
        max_learners: learners_max,
        persist_lease_checkpoints: config.feature_gates.enabled("LeaseCheckpointPersist"),
        quota_bytes: config.quota(),
    };
    let core = apply::Core::open(storage.clone(), settings.clone()).context("cannot read the store")?;
    let applied = core.applied_index();
    fit(&found, applied).with_context(|| format!("{} and the store beside it", config.wal_path().display()))?;
    let members = core.members();
    if members.is_removed(ids.member) {
        // C-17
        bail!(Removed);
    }
    members.check_release(settings.release)?;
    if config.force_new_cluster && log_exists {
        let own = Member {
            id: ids.member,
            peer_urls: config.initial_advertise_peer_urls.iter().map(ToString::to_string).collect(),
            ..Member::default()
        };
        force_new_cluster(&mut log, &mut found, members.clone(), own, applied, learners_max)?;
    }
    let recovered = Recovered {
        compacted,
        entries: found.entries,
        hard_state: found.hard_state,
        conf_state: core.members().conf_state(),
        applied,
    };
    Ok(Opened { ids, wal: log, recovered, storage, core, settings, stores, remotes })
}

/// A log and a store that are not of one member at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    #[error(
        "the store has applied entry {applied}, but the log ends at {last}: the log was lost or replaced; put it back, or \
         start with an empty data directory as a new member"
    )]
    LogLost { applied: u64, last: u64 },
    #[error(
        "the store has applied entry {applied} only, but the log begins after {begin}: the store is older than its log; put \
         the newer store back, or start with an empty data directory as a new member"
    )]
    StoreOlder { applied: u64, begin: u64 },
}

/// Whether raft can go on with this log from a store that has applied this entry.
pub fn fit(log: &wal::Recovered, applied: u64) -> Result<(), Unfit> {
    let begin = log.snapshot.index();
    let last = log.entries.last().map_or(begin, Entry::index);
    if applied > last {
        return Err(Unfit::LogLost { applied, last });
    }
    if applied < begin {
        return Err(Unfit::StoreOlder { applied, begin });
    }
    Ok(())
}

/// Makes this member's data a cluster of its own: entries that were never committed go, then come changes that remove all
/// others, as if they had been committed. They are durable when this returns.
fn force_new_cluster(
    log: &mut Wal,
    found: &mut wal::Recovered,
    mut members: Members,
    own: Member,
    applied: u64,
    learners_max: usize,
) -> anyhow::Result<()> {
    let commit = found.hard_state.commit.unwrap_or(0).max(applied);
    let dropped = found.entries.len();
    found.entries.retain(|entry| entry.index.unwrap_or(0) <= commit);
    let dropped = dropped - found.entries.len();
    // What is committed but not applied yet may change the members, too.
    for entry in &found.entries {
        if entry.index.unwrap_or(0) > applied && entry.r#type() == EntryType::EntryConfChange {
            let change = Change::decode(&ConfChange::decode(entry.data.clone().unwrap_or_default())?)?;
            // One that is refused has no effect; the rows follow when it is applied.
            let _ = members.apply(change, learners_max, &mut WriteBatch::default());
        }
    }
    let changes = bootstrap::alone(&members, own);
    let removed: Vec<String> = members.iter().map(|member| hex(member.id)).collect();
    let term = found.hard_state.term.unwrap_or(0).max(1);
    let entries: Vec<Entry> = (commit + 1..)
        .zip(&changes)
        .map(|(index, change)| Entry {
            r#type: Some(EntryType::EntryConfChange.into()),
            term: Some(term),
            index: Some(index),
            data: Some(change.encode(0).encode_to_vec().into()),
        })
        .collect();
    found.hard_state.term = Some(term);
    found.hard_state.commit = Some(commit + entries.len() as u64);
    log.append(&entries, Some(&found.hard_state), true)?;
    found.entries.extend(entries);
    tracing::warn!(
        uncommitted_entries_dropped = dropped,
        members_before = removed.join(","),
        "made a new cluster of this member alone, as --force-new-cluster says; start without it from now on"
    );
    Ok(())
}
