//! The membership as replicated state. Apply owns it; all copies and the stored rows agree at any time.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{Change, Version, ids, json};
use crate::{
    pb::{etcdserverpb, membershippb, raftpb},
    storage::{self, Bucket, Snapshot, Storage, Visit, WriteBatch},
};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Member {
    pub id: u64,
    pub peer_urls: Vec<String>,
    pub is_learner: bool,
    /// Empty until the member has started and published it.
    pub name: String,
    pub client_urls: Vec<String>,
}

impl Member {
    pub fn is_started(&self) -> bool {
        !self.name.is_empty()
    }
}

/// Why apply leaves the membership as it is. The entry counts as applied; raft is given a change of node 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("a member with this id has been removed")]
    Removed,
    #[error("a member with this id exists")]
    Exists,
    #[error("no such member")]
    NotFound,
    #[error("a peer URL belongs to another member")]
    PeerUrlExists,
    #[error("the member is no learner")]
    NotLearner,
    #[error("too many learners")]
    TooManyLearners,
}

/// A committed entry that cannot be applied: the process must end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("attributes of the unknown member {0:x}")]
    UnknownMember(u64),
    #[error("cluster version: {0}")]
    Version(#[from] super::version::ParseError),
    #[error(
        "invalid downgrade; server version is lower than determined cluster version: this is {own}, the cluster is at \
         {cluster}"
    )]
    TooOld { own: Version, cluster: Version },
}

/// A downgrade job; after its end with an empty target and not enabled.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Downgrade {
    #[serde(rename = "target-version", default)]
    pub target_version: String,
    #[serde(default)]
    pub enabled: bool,
}

/// Members, removed ids, cluster version and downgrade job. A clone is a snapshot and costs one pointer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Members(Arc<State>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    members: BTreeMap<u64, Member>,
    /// Never usable again.
    removed: BTreeSet<u64>,
    version: Option<Version>,
    downgrade: Downgrade,
}

const FIRST_STORAGE_VERSION: Version = Version::new(3, 6, 0);
const CLUSTER_VERSION: &[u8] = b"clusterVersion";
const DOWNGRADE: &[u8] = b"downgrade";
const REMOVED: &[u8] = b"removed";

impl Members {
    /// What is stored.
    pub fn load(storage: &dyn Storage) -> Result<Self, storage::Error> {
        Self::read(&|bucket, visit| storage.scan(bucket, &[], &[], visit))
    }

    /// What was stored at the moment of a snapshot.
    pub fn load_snapshot(snapshot: &dyn Snapshot) -> Result<Self, storage::Error> {
        Self::read(&|bucket, visit| snapshot.scan(bucket, &[], &[], visit))
    }

    fn read(rows: &Rows<'_>) -> Result<Self, storage::Error> {
        let mut state = State::default();
        scan(rows, Bucket::Members, |key, value| {
            let member = Member::from(serde_json::from_slice::<MemberJson>(value).map_err(|e| e.to_string())?);
            if parse_id(key)? != member.id {
                return Err(format!("holds member {:x}", member.id));
            }
            state.members.insert(member.id, member);
            Ok(())
        })?;
        scan(rows, Bucket::MembersRemoved, |key, _| {
            state.removed.insert(parse_id(key)?);
            Ok(())
        })?;
        scan(rows, Bucket::Cluster, |key, value| {
            match key {
                CLUSTER_VERSION => {
                    let text = std::str::from_utf8(value).map_err(|e| e.to_string())?;
                    state.version = Some(text.parse().map_err(|e: super::version::ParseError| e.to_string())?);
                }
                DOWNGRADE => state.downgrade = serde_json::from_slice(value).map_err(|e| e.to_string())?,
                _ => {}
            }
            Ok(())
        })?;
        Ok(Self(Arc::new(state)))
    }

    pub fn get(&self, id: u64) -> Option<&Member> {
        self.0.members.get(&id)
    }

    /// By ascending id.
    pub fn iter(&self) -> impl Iterator<Item = &Member> {
        self.0.members.values()
    }

    pub fn len(&self) -> usize {
        self.0.members.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.members.is_empty()
    }

    /// Ids that can never be used again, ascending.
    pub fn removed(&self) -> impl Iterator<Item = u64> {
        self.0.removed.iter().copied()
    }

    /// True if nothing can have changed between the two.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub fn is_removed(&self, id: u64) -> bool {
        self.0.removed.contains(&id)
    }

    /// What MemberList shows.
    pub fn list(&self) -> Vec<etcdserverpb::Member> {
        self.iter().map(etcdserverpb::Member::from).collect()
    }

    /// raft's configuration, ids ascending.
    pub fn conf_state(&self) -> raftpb::ConfState {
        let ids = |learner: bool| self.iter().filter(|m| m.is_learner == learner).map(|m| m.id).collect();
        raftpb::ConfState { voters: ids(false), learners: ids(true), auto_leave: Some(false), ..Default::default() }
    }

    /// `None` before it is decided.
    pub fn cluster_version(&self) -> Option<Version> {
        self.0.version
    }

    /// The layout of the data as clients and backups are told: the cluster's version, so that each of its members can read
    /// it. `None` before it is decided and below the first release that says so (C-36).
    pub fn storage_version(&self) -> Option<Version> {
        self.0.version.filter(|version| *version >= FIRST_STORAGE_VERSION)
    }

    pub fn downgrade(&self) -> &Downgrade {
        &self.0.downgrade
    }

    /// Whether [`Members::apply`] would carry out `change`.
    pub fn check(&self, change: &Change, learners_max: usize) -> Result<(), Refusal> {
        let id = change.member_id();
        if self.is_removed(id) {
            return Err(Refusal::Removed);
        }
        match change {
            Change::Add(_) if self.get(id).is_some() => Err(Refusal::Exists),
            Change::Add(member) if self.uses_any_of(&member.peer_urls, None) => Err(Refusal::PeerUrlExists),
            Change::Add(member) if member.is_learner && self.learners() >= learners_max => {
                Err(Refusal::TooManyLearners)
            }
            Change::Add(_) => Ok(()),
            Change::Promote(_) => match self.get(id) {
                None => Err(Refusal::NotFound),
                Some(member) if !member.is_learner => Err(Refusal::NotLearner),
                Some(_) => Ok(()),
            },
            Change::Update { .. } | Change::Remove(_) if self.get(id).is_none() => Err(Refusal::NotFound),
            Change::Update { peer_urls, .. } if self.uses_any_of(peer_urls, Some(id)) => Err(Refusal::PeerUrlExists),
            Change::Update { .. } | Change::Remove(_) => Ok(()),
        }
    }

    pub fn apply(&mut self, change: Change, learners_max: usize, batch: &mut WriteBatch) -> Result<(), Refusal> {
        self.check(&change, learners_max)?;
        let id = change.member_id();
        let state = Arc::make_mut(&mut self.0);
        match change {
            Change::Add(member) => {
                state.members.insert(id, member);
            }
            Change::Promote(_) => state.member_mut(id).is_learner = false,
            Change::Update { peer_urls, .. } => state.member_mut(id).peer_urls = peer_urls,
            Change::Remove(_) => {
                state.members.remove(&id);
                state.removed.insert(id);
                batch.delete(Bucket::Members, ids::hex(id));
                batch.put(Bucket::MembersRemoved, ids::hex(id), REMOVED);
                return Ok(());
            }
        }
        put_row(&state.members[&id], batch);
        Ok(())
    }

    /// A member has published its name and client URLs. One that was removed meanwhile is ignored.
    pub fn set_attributes(
        &mut self,
        request: membershippb::ClusterMemberAttrSetRequest,
        batch: &mut WriteBatch,
    ) -> Result<(), Error> {
        let id = request.member_id;
        if self.is_removed(id) {
            return Ok(());
        }
        if self.get(id).is_none() {
            return Err(Error::UnknownMember(id));
        }
        let attributes = request.member_attributes.unwrap_or_default();
        let member = Arc::make_mut(&mut self.0).member_mut(id);
        member.name = attributes.name;
        member.client_urls = attributes.client_urls;
        put_row(member, batch);
        Ok(())
    }

    /// Refused to a member of release `own` that is older: it must end, as it cannot follow what comes (C-34).
    pub fn set_version(
        &mut self,
        request: &membershippb::ClusterVersionSetRequest,
        own: Version,
        batch: &mut WriteBatch,
    ) -> Result<(), Error> {
        let version: Version = request.ver.parse()?;
        may_follow(own, version)?;
        Arc::make_mut(&mut self.0).version = Some(version);
        batch.put(Bucket::Cluster, CLUSTER_VERSION, version.to_string());
        Ok(())
    }

    /// Whether a member of release `own` can be part of this cluster (C-34).
    pub fn check_release(&self, own: Version) -> Result<(), Error> {
        self.cluster_version().map_or(Ok(()), |version| may_follow(own, version))
    }

    pub fn set_downgrade(&mut self, request: membershippb::DowngradeInfoSetRequest, batch: &mut WriteBatch) {
        let downgrade = Downgrade { target_version: request.ver, enabled: request.enabled };
        batch.put(Bucket::Cluster, DOWNGRADE, json::to_vec(&downgrade));
        Arc::make_mut(&mut self.0).downgrade = downgrade;
    }

    fn learners(&self) -> usize {
        self.iter().filter(|member| member.is_learner).count()
    }

    fn uses_any_of(&self, peer_urls: &[String], except: Option<u64>) -> bool {
        self.iter()
            .filter(|member| Some(member.id) != except)
            .any(|member| member.peer_urls.iter().any(|url| peer_urls.contains(url)))
    }
}

fn may_follow(own: Version, cluster: Version) -> Result<(), Error> {
    let own = own.cluster_version();
    if own < cluster { Err(Error::TooOld { own, cluster }) } else { Ok(()) }
}

impl State {
    fn member_mut(&mut self, id: u64) -> &mut Member {
        self.members.get_mut(&id).expect("the change was checked")
    }
}

impl From<&Member> for etcdserverpb::Member {
    fn from(member: &Member) -> Self {
        Self {
            id: member.id,
            name: member.name.clone(),
            peer_ur_ls: member.peer_urls.clone(),
            client_ur_ls: member.client_urls.clone(),
            is_learner: member.is_learner,
        }
    }
}

/// A member as rows and membership changes spell it. The order of the fields is part of the format.
#[derive(Serialize, Deserialize)]
pub(super) struct MemberJson {
    id: u64,
    #[serde(
        rename = "peerURLs",
        default,
        serialize_with = "json::null_if_empty",
        deserialize_with = "json::empty_if_null"
    )]
    peer_urls: Vec<String>,
    #[serde(rename = "isLearner", default, skip_serializing_if = "std::ops::Not::not")]
    is_learner: bool,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    name: String,
    #[serde(
        rename = "clientURLs",
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "json::empty_if_null"
    )]
    client_urls: Vec<String>,
}

impl From<Member> for MemberJson {
    fn from(member: Member) -> Self {
        let Member { id, peer_urls, is_learner, name, client_urls } = member;
        Self { id, peer_urls, is_learner, name, client_urls }
    }
}

impl From<MemberJson> for Member {
    fn from(member: MemberJson) -> Self {
        let MemberJson { id, peer_urls, is_learner, name, client_urls } = member;
        Self { id, peer_urls, is_learner, name, client_urls }
    }
}

/// A list as members show it to each other.
pub fn members_to_json<'a>(members: impl IntoIterator<Item = &'a Member>) -> Vec<u8> {
    let members: Vec<MemberJson> = members.into_iter().cloned().map(MemberJson::from).collect();
    json::to_vec(&members)
}

pub fn members_from_json(text: &[u8]) -> Result<Vec<Member>, serde_json::Error> {
    let members: Vec<MemberJson> = serde_json::from_slice(text)?;
    Ok(members.into_iter().map(Member::from).collect())
}

fn put_row(member: &Member, batch: &mut WriteBatch) {
    batch.put(Bucket::Members, ids::hex(member.id), json::to_vec(&MemberJson::from(member.clone())));
}

fn parse_id(key: &[u8]) -> Result<u64, String> {
    let text = std::str::from_utf8(key).map_err(|e| e.to_string())?;
    let id = u64::from_str_radix(text, 16).map_err(|e| e.to_string())?;
    // Any other spelling would be a second row for the same id.
    if ids::hex(id) == text { Ok(id) } else { Err("is no id".to_owned()) }
}

/// Scans a whole bucket.
type Rows<'a> = dyn Fn(Bucket, Visit<'_>) -> Result<(), storage::Error> + 'a;

/// Visits each row of a bucket; the first that cannot be read ends it.
fn scan(
    rows: &Rows<'_>,
    bucket: Bucket,
    mut row: impl FnMut(&[u8], &[u8]) -> Result<(), String>,
) -> Result<(), storage::Error> {
    let mut damaged = None;
    rows(bucket, &mut |key, value| match row(key, &value) {
        Ok(()) => true,
        Err(reason) => {
            let key = String::from_utf8_lossy(key);
            damaged = Some(storage::Error::Fatal(format!("row {key:?} of {}: {reason}", bucket.name())));
            false
        }
    })?;
    damaged.map_or(Ok(()), Err)
}
