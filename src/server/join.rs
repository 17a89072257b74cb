//! How a member without data begins: with the others of a new cluster, whom it knows or has to find, or as a new member of
//! a running one. What the others say is fetched here; what it means is decided in `cluster::bootstrap`.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, anyhow, bail};

use crate::{
    cluster::{
        Member, Version,
        bootstrap::{self, Founding, InitialCluster},
        discovery::Keys,
        ids,
    },
    config::{Config, ETCD_VERSION, Url},
    pb::raftpb::{Entry, HardState},
    peer::client,
};

use super::{data::Ids, discovery, dns::Resolver, srv};

/// How long the others are asked whether this member has been there before.
const ASK_NEW: Duration = Duration::from_secs(1);
/// How long each member of a running cluster is asked for something.
const ASK_EXISTING: Duration = Duration::from_secs(10);
/// How long names that do not resolve are tried.
const RESOLVE: Duration = Duration::from_secs(30);
const RESOLVE_RETRY: Duration = Duration::from_secs(1);

/// The first content of a member's log.
pub struct First {
    pub ids: Ids,
    /// Empty for a member that gets the log of a running cluster.
    pub entries: Vec<Entry>,
    pub hard_state: Option<HardState>,
    /// Whom to get that log from.
    pub remotes: Vec<Member>,
}

pub async fn begin(config: &Config) -> anyhow::Result<First> {
    let existing = config.initial_cluster_state == "existing";
    if !config.discovery.endpoints.is_empty() {
        return discover(config, existing).await;
    }
    let initial = match config.discovery_srv.is_empty() {
        true => InitialCluster::parse(&config.initial_cluster, parse_url).map_err(|e| e.to_string()),
        false => srv::initial_cluster(config, &Resolver::system()).await,
    };
    let initial = initial.map_err(|reason| anyhow!("error setting up initial cluster: {reason}"))?;
    if existing { join(config, &initial).await } else { found(config, &initial).await }
}

fn parse_url(text: &str) -> Result<String, String> {
    Url::parse(text).map(|url| url.to_string())
}

fn advertised(config: &Config) -> Vec<String> {
    config.initial_advertise_peer_urls.iter().map(ToString::to_string).collect()
}

/// A new cluster whose members find each other in the discovery service; its token is the cluster's.
async fn discover(config: &Config, existing: bool) -> anyhow::Result<First> {
    let own = InitialCluster::of_one(&config.name, &advertised(config));
    own.check(&config.name)?;
    if existing {
        bail!("discovery URL should not be set when joining existing initial cluster");
    }
    let settings = &config.discovery;
    let member = own.found(&settings.token).member_id(&config.name).context("it is the only one")?;
    let keys = Keys::new(&settings.token, member);
    let initial = discovery::join(settings, keys, &own.to_string())
        .await
        .map_err(|reason| anyhow!("failed to join discovery cluster ({reason})"))?;
    if initial.has_duplicate_url() {
        bail!("discovery cluster {initial} has duplicate url");
    }
    let founding = initial.found(&settings.token);
    // Two members of one name would be taken for one with the URLs of both.
    if !founding.members.iter().any(|of| of.id == member) {
        bail!("discovery cluster {initial} has no member of its own for this one; each member needs a name of its own");
    }
    Ok(first(founding, member))
}

/// A new cluster: each of its members computes the same from the same list.
async fn found(config: &Config, initial: &InitialCluster) -> anyhow::Result<First> {
    let advertised = advertised(config);
    match initial.validate(&config.name, &advertised, str::to_owned) {
        Err(bootstrap::Error::NotAdvertised { .. } | bootstrap::Error::NotInitial { .. }) => {
            let resolved = resolve_all(initial.urls().chain(advertised.iter().map(String::as_str))).await;
            initial.validate(&config.name, &advertised, |url| resolved_form(&resolved, url))?;
        }
        done => done?,
    }
    let founding = initial.found(&config.initial_cluster_token);
    let member = founding.member_id(&config.name).context("the own name is in --initial-cluster")?;
    if let Some((_, members)) = first_members(&initial.others(&config.name), ASK_NEW).await {
        let known = members.iter().find(|other| other.id == member);
        if known.is_some_and(|member| !member.client_urls.is_empty()) {
            bail!("member {} has already been bootstrapped", ids::hex(member));
        }
    }
    Ok(first(founding, member))
}

fn first(founding: Founding, member: u64) -> First {
    First {
        ids: Ids { member, cluster: founding.cluster_id },
        entries: founding.entries(),
        hard_state: Some(founding.hard_state()),
        remotes: Vec::new(),
    }
}

/// A running cluster, which has been told of this member: ids come from there, and the log will.
async fn join(config: &Config, initial: &InitialCluster) -> anyhow::Result<First> {
    initial.check(&config.name)?;
    let others = initial.others(&config.name);
    let (cluster, members) = first_members(&others, ASK_EXISTING).await.context(
        "cannot fetch cluster info from peer urls: could not retrieve cluster information from the given URLs",
    )?;
    let member = match initial.join(&config.name, &members, str::to_owned) {
        Err(bootstrap::Error::NoMatch { .. }) => {
            let listed = members.iter().flat_map(|member| &member.peer_urls).map(String::as_str);
            let resolved = resolve_all(initial.urls().chain(listed)).await;
            initial.join(&config.name, &members, |url| resolved_form(&resolved, url))
        }
        done => done,
    };
    let member = member.map_err(|e| anyhow!("error validating peerURLs {}: {e}", listed(cluster, &members)))?;
    // Its leader would end it, as etcd's does, but it could vote before it hears of one.
    if members.iter().any(|known| known.id == member && !known.client_urls.is_empty()) {
        bail!(
            "member {} has been started before, and the log here is empty: was its end lost? A member that has lost what \
             it acknowledged could help to elect a leader without it. Remove it from the cluster and add it as a new one",
            ids::hex(member)
        );
    }
    check_versions(member, &members).await?;
    let learners = members.iter().filter(|member| member.is_learner).count();
    if learners > usize::try_from(config.max_learners).unwrap_or(0) {
        bail!("membership: too many learner members in cluster");
    }
    Ok(First { ids: Ids { member, cluster }, entries: Vec::new(), hard_state: None, remotes: members })
}

/// Each other member's answer counts, as far as it knows the cluster's version.
async fn check_versions(own_id: u64, members: &[Member]) -> anyhow::Result<()> {
    let mut told = Vec::new();
    let mut downgrading = None;
    for member in members.iter().filter(|member| member.id != own_id) {
        for url in &member.peer_urls {
            match client::versions(url, ASK_EXISTING).await {
                Ok(versions) => {
                    told.extend(versions.cluster.parse::<Version>());
                    break;
                }
                Err(e) => tracing::warn!("cannot learn a member's version: {e}"),
            }
        }
        for url in &member.peer_urls {
            if downgrading.is_none() {
                downgrading = client::downgrade_enabled(url, ASK_EXISTING).await.ok();
            }
        }
    }
    let own: Version = ETCD_VERSION.parse()?;
    Ok(bootstrap::check_versions(own, &told, downgrading.unwrap_or(false))?)
}

/// What the first of these URLs that answers says.
async fn first_members(urls: &[&str], timeout: Duration) -> Option<(u64, Vec<Member>)> {
    for url in urls {
        match client::members(url, timeout).await {
            Ok(answer) => return Some(answer),
            Err(e) => tracing::info!("no list of members: {e}"),
        }
    }
    None
}

/// The URLs whose host is a name, with its address in its place. Names that do not resolve in time are left out.
async fn resolve_all<'a>(urls: impl Iterator<Item = &'a str>) -> BTreeMap<String, String> {
    let deadline = tokio::time::Instant::now() + RESOLVE;
    let mut resolved = BTreeMap::new();
    for text in urls {
        let Ok(url) = Url::parse(text) else { continue };
        if url.is_socket() || url.host() == "localhost" || url.host().parse::<std::net::IpAddr>().is_ok() {
            continue;
        }
        while !resolved.contains_key(text) && tokio::time::Instant::now() < deadline {
            let host_and_port = format!("{}:{}", url.host(), url.port());
            match tokio::time::timeout_at(deadline, tokio::net::lookup_host(&host_and_port)).await {
                Ok(Ok(mut found)) => {
                    let address =
                        found.next().map_or_else(|| url.host().to_owned(), |address| address.ip().to_string());
                    resolved.insert(text.to_owned(), url.with_host(&address).to_string());
                }
                Ok(Err(e)) => {
                    tracing::warn!(host = url.host(), "cannot resolve a peer URL: {e}; trying again");
                    tokio::time::sleep(RESOLVE_RETRY).await;
                }
                Err(_) => {}
            }
        }
    }
    resolved
}

fn resolved_form(resolved: &BTreeMap<String, String>, url: &str) -> String {
    resolved.get(url).cloned().unwrap_or_else(|| url.to_owned())
}

/// A running cluster in a text, spelt as etcd spells it.
fn listed(cluster: u64, members: &[Member]) -> String {
    let member = |m: &Member| {
        format!(
            "&{{ID:{} RaftAttributes:{{PeerURLs:[{}] IsLearner:{}}} Attributes:{{Name:{} ClientURLs:[{}]}}}}",
            ids::hex(m.id),
            m.peer_urls.join(" "),
            m.is_learner,
            m.name,
            m.client_urls.join(" ")
        )
    };
    let members: Vec<String> = members.iter().map(member).collect();
    format!("{{ClusterID:{} Members:[{}] RemovedMemberIDs:[]}}", ids::hex(cluster), members.join(" "))
}
