//! How a new cluster begins: `--initial-cluster`, and the first log entries, which every founding member writes by
//! itself and which must agree to the byte.

use std::{collections::BTreeMap, fmt};

use prost::Message;

use super::{Change, Member, Members, Version, ids};
use crate::pb::{
    etcdserverpb::InternalRaftRequest,
    membershippb::{Attributes, ClusterMemberAttrSetRequest, ClusterVersionSetRequest},
    raftpb::{Entry, EntryType, HardState},
};

/// Term of the first entries; the first election is for the next one.
const FIRST_TERM: u64 = 1;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Url(String),
    #[error("couldn't find local name {0:?} in the initial cluster configuration")]
    UnknownName(String),
    #[error("initial cluster {0} has duplicate url")]
    DuplicateUrl(String),
    #[error("--initial-cluster has {missing} but missing from --initial-advertise-peer-urls={advertised} ({reason})")]
    NotAdvertised { missing: String, advertised: String, reason: String },
    #[error("--initial-advertise-peer-urls has {missing} but missing from --initial-cluster={advertised}")]
    NotInitial { missing: String, advertised: String },
    #[error("member count is unequal")]
    MemberCount,
    #[error("PeerURLs: no match found for existing member ({id}, [{urls}]), last resolver error ({reason})")]
    NoMatch { id: String, urls: String, reason: String },
}

/// A running cluster that this member may not be part of.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("incompatible with current running cluster")]
pub struct Incompatible;

/// The oldest cluster that members of this release can be part of.
const OLDEST: Version = Version::new(3, 0, 0);

/// Whether a member of this version may join a cluster whose members tell these cluster versions, as far as they know one
/// (C-34).
pub fn check_versions(own: Version, told: &[Version], downgrading: bool) -> Result<(), Incompatible> {
    let own = own.cluster_version();
    let fits = |version: &Version| {
        let version = version.cluster_version();
        if downgrading { own.is_one_minor_below(version) } else { (OLDEST..=own).contains(&version) }
    };
    if told.is_empty() || !told.iter().all(fits) { Err(Incompatible) } else { Ok(()) }
}

/// What turns the data of one member into a cluster of its own: the changes that follow the last committed entry.
/// A vote comes before the others go: raft needs a voter at any time.
pub fn alone(members: &Members, own: Member) -> Vec<Change> {
    let mut changes = Vec::new();
    match members.get(own.id) {
        None => changes.push(Change::Add(own.clone())),
        Some(member) if member.is_learner => changes.push(Change::Promote(own.id)),
        Some(_) => {}
    }
    changes.extend(members.iter().filter(|member| member.id != own.id).map(|member| Change::Remove(member.id)));
    changes
}

/// Names and peer URLs of the members a cluster begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitialCluster {
    /// The URLs of each name, sorted.
    members: BTreeMap<String, Vec<String>>,
}

impl InitialCluster {
    /// Reads `a=http://h:1,a=http://h:2,b=http://i:1`; `parse_url` checks one URL and returns its normal form.
    pub fn parse(text: &str, parse_url: impl Fn(&str) -> Result<String, String>) -> Result<Self, Error> {
        let mut members: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for pair in text.split(',').filter(|pair| !pair.is_empty()) {
            let (name, url) = pair.split_once('=').unwrap_or((pair, ""));
            members.entry(name.to_owned()).or_default().push(parse_url(url).map_err(Error::Url)?);
        }
        for urls in members.values_mut() {
            urls.sort_unstable();
        }
        Ok(Self { members })
    }

    /// One member alone; without URLs it is none.
    pub fn of_one(name: &str, urls: &[String]) -> Self {
        let mut urls = urls.to_vec();
        urls.sort_unstable();
        let members = (!urls.is_empty()).then(|| (name.to_owned(), urls));
        Self { members: members.into_iter().collect() }
    }

    /// Whether there is a member `name`, and each URL belongs to one member only.
    pub fn check(&self, name: &str) -> Result<(), Error> {
        self.own_urls(name)?;
        match self.has_duplicate_url() {
            true => Err(Error::DuplicateUrl(self.to_string())),
            false => Ok(()),
        }
    }

    pub fn has_duplicate_url(&self) -> bool {
        let mut all: Vec<&String> = self.members.values().flatten().collect();
        all.sort_unstable();
        all.windows(2).any(|pair| pair[0] == pair[1])
    }

    /// Whether the member `name`, which tells others `advertised` (in any order), may begin a cluster with this. URLs
    /// that differ as written are compared again as `resolve` gives them.
    pub fn validate(&self, name: &str, advertised: &[String], resolve: impl Fn(&str) -> String) -> Result<(), Error> {
        let own = self.own_urls(name)?;
        if same_urls(own, advertised, &resolve) {
            return self.check(name);
        }
        let mut advertised = advertised.to_vec();
        advertised.sort_unstable();
        let not_in = |urls: &[String], other: &[String]| {
            urls.iter().filter(|url| !other.contains(url)).cloned().collect::<Vec<_>>()
        };
        let named = |urls: &[String]| urls.iter().map(|url| format!("{name}={url}")).collect::<Vec<_>>().join(",");
        let missing = not_in(own, &advertised);
        if !missing.is_empty() {
            let reason = difference(&advertised, own, &resolve);
            let (missing, advertised) = (named(&missing), advertised.join(","));
            return Err(Error::NotAdvertised { missing, advertised, reason });
        }
        let missing = not_in(&advertised, own).join(",");
        // etcd's text has the advertised URLs in place of the list's.
        Err(Error::NotInitial { missing, advertised: named(&advertised) })
    }

    /// Finds the member `name` among those of a running cluster, by its URLs; all must be the same on both sides.
    pub fn join(&self, name: &str, running: &[Member], resolve: impl Fn(&str) -> String) -> Result<u64, Error> {
        self.own_urls(name)?;
        if running.len() != self.members.len() {
            return Err(Error::MemberCount);
        }
        let mut running: Vec<&Member> = running.iter().collect();
        running.sort_by(|a, b| a.peer_urls.cmp(&b.peer_urls));
        let mut left: Vec<(&String, &Vec<String>)> = self.members.iter().collect();
        left.sort_by_key(|(_, urls)| *urls);
        let last = left.last().map(|(_, urls)| *urls);
        let mut found = None;
        for member in running {
            let Some(at) = left.iter().position(|(_, urls)| same_urls(urls, &member.peer_urls, &resolve)) else {
                let reason = last.map(|last| difference(&member.peer_urls, last, &resolve));
                let reason = reason.unwrap_or_default();
                return Err(Error::NoMatch { id: ids::hex(member.id), urls: member.peer_urls.join(" "), reason });
            };
            if left.remove(at).0 == name {
                found = Some(member.id);
            }
        }
        found.ok_or(Error::MemberCount)
    }

    /// The peer URLs of all members but `name`, sorted.
    pub fn others(&self, name: &str) -> Vec<&str> {
        let others = self.members.iter().filter(|(of, _)| *of != name);
        let mut urls: Vec<&str> = others.flat_map(|(_, urls)| urls).map(String::as_str).collect();
        urls.sort_unstable();
        urls
    }

    /// All peer URLs.
    pub fn urls(&self) -> impl Iterator<Item = &str> {
        self.members.values().flatten().map(String::as_str)
    }

    pub fn has_member(&self, name: &str) -> bool {
        self.members.contains_key(name)
    }

    fn own_urls(&self, name: &str) -> Result<&Vec<String>, Error> {
        self.members.get(name).ok_or_else(|| Error::UnknownName(name.to_owned()))
    }

    /// The cluster that these members begin with this token.
    pub fn found(&self, token: &str) -> Founding {
        let mut members: Vec<Member> = self
            .members
            .iter()
            .map(|(name, peer_urls)| Member {
                id: ids::member_id_for_bootstrap(peer_urls, token),
                peer_urls: peer_urls.clone(),
                name: name.clone(),
                ..Member::default()
            })
            .collect();
        members.sort_unstable_by_key(|member| member.id);
        let ids: Vec<u64> = members.iter().map(|member| member.id).collect();
        Founding { cluster_id: ids::cluster_id(&ids), members }
    }
}

/// `a=http://h:1,b=http://i:1`, sorted.
impl fmt::Display for InitialCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs = self.members.iter().flat_map(|(name, urls)| urls.iter().map(move |url| format!("{name}={url}")));
        f.write_str(&pairs.collect::<Vec<_>>().join(","))
    }
}

/// What all founding members agree on before the first message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Founding {
    pub cluster_id: u64,
    /// By ascending id.
    pub members: Vec<Member>,
}

impl Founding {
    pub fn member_id(&self, name: &str) -> Option<u64> {
        self.members.iter().find(|member| member.name == name).map(|member| member.id)
    }

    /// The first entries of the log: each member joins, in order of the ids.
    pub fn entries(&self) -> Vec<Entry> {
        let change = |member: &Member| Change::Add(member.clone()).encode(0).encode_to_vec();
        let entry = |(index, member)| Entry {
            r#type: Some(EntryType::EntryConfChange.into()),
            term: Some(FIRST_TERM),
            index: Some(index),
            data: Some(change(member).into()),
        };
        (1..).zip(&self.members).map(entry).collect()
    }

    /// The first entries are committed from the start: nobody can disagree with them.
    pub fn hard_state(&self) -> HardState {
        HardState { term: Some(FIRST_TERM), vote: Some(0), commit: Some(self.members.len() as u64) }
    }
}

/// Tells the cluster this member's name and client URLs, proposed after each start until applied.
pub fn publish_request(member_id: u64, name: &str, client_urls: &[String]) -> InternalRaftRequest {
    let attributes = Attributes { name: name.to_owned(), client_urls: client_urls.to_vec() };
    let request = ClusterMemberAttrSetRequest { member_id, member_attributes: Some(attributes) };
    InternalRaftRequest { cluster_member_attr_set: Some(request), ..Default::default() }
}

/// Raises (or, at the end of a downgrade, lowers) the cluster version; proposed by the leader.
pub fn cluster_version_request(version: Version) -> InternalRaftRequest {
    let request = ClusterVersionSetRequest { ver: version.cluster_version().to_string() };
    InternalRaftRequest { cluster_version_set: Some(request), ..Default::default() }
}

/// Whether both lists name the same places, as written or else as resolved.
fn same_urls(a: &[String], b: &[String], resolve: impl Fn(&str) -> String) -> bool {
    let sorted = |urls: &[String], form: &dyn Fn(&str) -> String| {
        let mut urls: Vec<String> = urls.iter().map(|url| form(url)).collect();
        urls.sort_unstable();
        urls
    };
    let same = |form: &dyn Fn(&str) -> String| sorted(a, form) == sorted(b, form);
    same(&str::to_owned) || same(&resolve)
}

/// How the URLs a member tells others differ from those it was given.
fn difference(told: &[String], initial: &[String], resolve: impl Fn(&str) -> String) -> String {
    if told.len() != initial.len() {
        return format!("len({}) != len({})", quoted(told), quoted(initial));
    }
    let resolved = |urls: &[String]| {
        let mut urls: Vec<String> = urls.iter().map(|url| resolve(url)).collect();
        urls.sort_unstable();
        urls
    };
    let pair = resolved(told).into_iter().zip(resolved(initial)).find(|(a, b)| a != b);
    pair.map(|(a, b)| format!("resolved urls: {a:?} != {b:?}")).unwrap_or_default()
}

fn quoted(urls: &[String]) -> String {
    let urls: Vec<String> = urls.iter().map(|url| format!("{url:?}")).collect();
    format!("[{}]", urls.join(" "))
}
