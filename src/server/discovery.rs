//! Asks the discovery service, another cluster, for the first members (`cluster::discovery` says what its answers mean).
//!
//! Whatever may pass is tried again without end: members are started before the service, or while it is restarted. What
//! an operator has to mend ends the start.

use std::{error::Error as _, time::Duration};

use prost::Message as _;
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt as _;
use tonic::{
    Code, Request, Status,
    metadata::AsciiMetadataValue,
    transport::{Channel, Endpoint},
};

use crate::{
    cluster::{
        bootstrap::InitialCluster,
        discovery::{self, Keys, Registrations},
    },
    config::{Discovery, GoDuration, Url},
    mvcc::record::{KeyValue, RawEvent},
    pb::etcdserverpb::{
        AuthenticateRequest, PutRequest, RangeRequest, WatchCreateRequest, WatchRequest, auth_client::AuthClient,
        kv_client::KvClient, watch_client::WatchClient, watch_request::RequestUnion,
    },
};

/// Servers cut connections that ping more often than they allow, so more often than this is not asked for.
const PING_INTERVAL_MIN: Duration = Duration::from_secs(10);
/// The wait before another try doubles so many times.
const DOUBLINGS_MAX: u32 = 8;
/// Before endpoints none of which can be reached are tried again, within one request's time.
const ENDPOINTS_PAUSE: Duration = Duration::from_millis(100);
/// What a server without users answers to who logs in.
const NO_USERS: &str = "etcdserver: authentication is not enabled";

/// Why there is no list of members yet.
#[derive(Debug)]
enum Failure {
    /// Tried again.
    Passing(String),
    Final(String),
}

impl From<discovery::Error> for Failure {
    fn from(error: discovery::Error) -> Self {
        Self::Final(error.to_string())
    }
}

/// Registers a member as `registration` (`name=url`) and waits until all have. The error is the reason alone.
pub async fn join(settings: &Discovery, keys: Keys, registration: &str) -> Result<InitialCluster, String> {
    let mut service = Service::new(settings)?;
    // Wrong credentials are no better later.
    service.log_in().await?;
    let mut joining = Joining { service, keys, registration, registered: false, failures: 0 };
    loop {
        match joining.round().await {
            Ok(cluster) => return Ok(cluster),
            Err(Failure::Final(reason)) => return Err(reason),
            Err(Failure::Passing(reason)) => {
                joining.failures += 1;
                let wait = Duration::from_secs(1 << joining.failures.min(DOUBLINGS_MAX));
                tracing::warn!(reason, retry_in = ?wait, "no answer of the discovery service; trying again");
                sleep(wait).await;
                // A token may have run out.
                joining.service.logged_in = false;
            }
        }
    }
}

struct Joining<'a> {
    service: Service,
    keys: Keys,
    registration: &'a str,
    registered: bool,
    /// In a row.
    failures: u32,
}

impl Joining<'_> {
    async fn round(&mut self) -> Result<InitialCluster, Failure> {
        if !self.service.logged_in {
            self.service.log_in().await.map_err(Failure::Passing)?;
        }
        let (mut registrations, mut revision) = self.look().await?;
        if !self.registered {
            self.service.put(&self.keys.own, self.registration).await?;
            self.registered = true;
            tracing::info!(key = self.keys.own, value = self.registration, "registered at the discovery service");
            // Somebody else may have taken the last place meanwhile.
            (registrations, revision) = self.look().await?;
        }
        self.service.wait(&mut registrations, &self.keys.members, revision).await?;
        let parse = |text: &str| Url::parse(text).map(|url| url.to_string());
        let cluster = registrations.initial_cluster(parse)?;
        tracing::info!(initial_cluster = %cluster, "all members are registered at the discovery service");
        Ok(cluster)
    }

    /// Who is registered as of which revision, as long as there is a place for this member.
    async fn look(&mut self) -> Result<(Registrations, i64), Failure> {
        let (size, _) = self.service.range(&self.keys.size, Vec::new()).await?;
        let size = discovery::size(size.first().map(|kv| &kv.value[..]))?;
        let (members, revision) = self.service.range(&self.keys.members, prefix_end(&self.keys.members)).await?;
        self.failures = 0;
        let mut registrations = Registrations::new(self.keys.clone(), size);
        for member in &members {
            note(&mut registrations, member);
        }
        registrations.check()?;
        Ok((registrations, revision))
    }
}

fn note(registrations: &mut Registrations, kv: &KeyValue) {
    let key = String::from_utf8_lossy(&kv.key);
    match registrations.add(&kv.key, &kv.value, kv.create_revision) {
        Ok(()) => {
            let value = String::from_utf8_lossy(&kv.value);
            tracing::info!(%key, %value, "found a member at the discovery service");
        }
        Err(reason) => tracing::warn!(%key, "{reason}"),
    }
}

/// The end of the range of all keys that begin so.
fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // No byte of the text is the last one there is.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

/// Another cluster's endpoints, of which one is used as long as it answers.
struct Service {
    channels: Vec<Channel>,
    in_use: usize,
    request_timeout: Duration,
    log_in_timeout: Option<Duration>,
    user: Option<AuthenticateRequest>,
    logged_in: bool,
    token: Option<AsciiMetadataValue>,
}

impl Service {
    fn new(settings: &Discovery) -> Result<Self, String> {
        let channels = settings.endpoints.iter().map(|text| Ok(endpoint(settings, text)?.connect_lazy()));
        let (name, password) = match settings.user.split_once(':') {
            Some(both) if settings.password.is_empty() => both,
            _ => (&settings.user[..], &settings.password[..]),
        };
        let user = AuthenticateRequest { name: name.to_owned(), password: password.to_owned() };
        Ok(Self {
            channels: channels.collect::<Result<_, String>>()?,
            in_use: 0,
            request_timeout: settings.request_timeout.to_std(),
            log_in_timeout: positive(settings.dial_timeout),
            user: (!user.name.is_empty() && !user.password.is_empty()).then_some(user),
            logged_in: false,
            token: None,
        })
    }

    /// Asks the endpoint in use, and the others while it cannot be reached.
    async fn ask<A>(&mut self, limit: Duration, ask: impl AsyncFn(Channel) -> Result<A, Status>) -> Result<A, Status> {
        let asking = async {
            loop {
                for _ in 0..self.channels.len() {
                    match ask(self.channels[self.in_use].clone()).await {
                        Err(status) if is_unreachable(&status) => self.in_use = (self.in_use + 1) % self.channels.len(),
                        answered => return answered,
                    }
                }
                sleep(ENDPOINTS_PAUSE).await;
            }
        };
        match timeout(limit, asking).await {
            Ok(answered) => answered,
            Err(_) => {
                // It may be the one that hangs.
                self.in_use = (self.in_use + 1) % self.channels.len();
                Err(Status::deadline_exceeded("context deadline exceeded"))
            }
        }
    }

    async fn log_in(&mut self) -> Result<(), String> {
        self.token = None;
        if let Some(user) = self.user.clone() {
            let limit = self.log_in_timeout.unwrap_or(Duration::MAX);
            let ask = async |channel| Ok(AuthClient::new(channel).authenticate(user.clone()).await?.into_inner());
            match self.ask(limit, ask).await {
                Ok(answer) => {
                    let token = answer.token.parse().map_err(|_| "the discovery service's token is no text")?;
                    self.token = Some(token);
                }
                Err(status) if status.message() == NO_USERS => {}
                Err(status) => return Err(status.message().to_owned()),
            }
        }
        self.logged_in = true;
        Ok(())
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("token", token.clone());
        }
        request
    }

    /// The keys from `key` to `end`, or `key` alone, and the revision they were read at.
    async fn range(&mut self, key: &str, end: Vec<u8>) -> Result<(Vec<KeyValue>, i64), Failure> {
        let range = RangeRequest { key: key.to_owned().into(), range_end: end.into(), ..Default::default() };
        let request = self.request(());
        let ask = async |channel| {
            let request = Request::from_parts(request.metadata().clone(), Default::default(), range.clone());
            Ok(KvClient::new(channel).range(request).await?.into_inner())
        };
        let answer = self.ask(self.request_timeout, ask).await.map_err(passing)?;
        let kvs = answer.kvs.iter().map(|kv| kv.decode_record()).collect::<Result<_, _>>();
        let kvs = kvs.map_err(|e| Failure::Passing(format!("an answer that cannot be read: {e}")))?;
        Ok((kvs, answer.header.map_or(0, |header| header.revision)))
    }

    /// Doing it twice does no harm: the key keeps the revision that made it.
    async fn put(&mut self, key: &str, value: &str) -> Result<(), Failure> {
        let put = PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..Default::default() };
        let request = self.request(());
        let ask = async |channel| {
            let request = Request::from_parts(request.metadata().clone(), Default::default(), put.clone());
            Ok(KvClient::new(channel).put(request).await?.into_inner())
        };
        self.ask(self.request_timeout, ask).await.map_err(passing)?;
        Ok(())
    }

    /// Until enough members are registered, for as long as that takes.
    async fn wait(&self, registrations: &mut Registrations, prefix: &str, after: i64) -> Result<(), Failure> {
        if registrations.is_complete() {
            return Ok(());
        }
        tracing::info!(
            found = registrations.found(),
            needed = registrations.size(),
            "waiting for members to register at the discovery service"
        );
        let create = WatchCreateRequest {
            key: prefix.to_owned().into(),
            range_end: prefix_end(prefix).into(),
            start_revision: after + 1,
            ..Default::default()
        };
        let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        // The stream of questions stays open, or the answers would end.
        let questions = tokio_stream::once(create).chain(tokio_stream::pending());
        let mut client = WatchClient::new(self.channels[self.in_use].clone());
        let mut answers = client.watch(self.request(questions)).await.map_err(passing)?.into_inner();
        while !registrations.is_complete() {
            let answer = answers.message().await.map_err(passing)?;
            let answer = answer.ok_or_else(|| Failure::Passing("the watch ended".into()))?;
            if answer.canceled {
                return Err(Failure::Passing(format!("the watch was canceled: {}", answer.cancel_reason)));
            }
            for event in &answer.events {
                let kv =
                    registered(event).map_err(|e| Failure::Passing(format!("an event that cannot be read: {e}")))?;
                note(registrations, &kv);
            }
        }
        Ok(())
    }
}

fn passing(status: Status) -> Failure {
    Failure::Passing(status.message().to_owned())
}

/// Whether another endpoint may do better: nothing came back, or that there is no leader.
fn is_unreachable(status: &Status) -> bool {
    status.code() == Code::Unavailable || status.source().is_some()
}

/// The key an event is about.
fn registered(event: &RawEvent) -> Result<KeyValue, prost::DecodeError> {
    #[derive(Clone, PartialEq, prost::Message)]
    struct Event {
        #[prost(message, optional, tag = "2")]
        kv: Option<KeyValue>,
    }
    Ok(Event::decode(event.0.clone())?.kv.unwrap_or_default())
}

fn positive(duration: GoDuration) -> Option<Duration> {
    (duration > GoDuration::ZERO).then(|| duration.to_std())
}

/// Where and how one endpoint is reached: `http://h:1`, `h:1` or a socket's `unix://…`.
fn endpoint(settings: &Discovery, text: &str) -> Result<Endpoint, String> {
    let asks_for_tls = !settings.insecure_transport
        || settings.insecure_skip_tls_verify
        || [&settings.cert, &settings.key, &settings.cacert].into_iter().any(|file| !file.is_empty());
    let scheme = text.split_once("://").map_or("", |(scheme, _)| scheme);
    let is_secure = match scheme {
        "https" | "unixs" => true,
        "http" => false,
        _ => asks_for_tls,
    };
    if is_secure {
        // Plaintext in place of TLS would be worse than no service.
        return Err(format!("--discovery-endpoints {text}: TLS is not implemented yet; use http, or wait for it"));
    }
    let uri = match scheme {
        "" if !text.starts_with("unix:") => format!("http://{text}"),
        _ => text.to_owned(),
    };
    let endpoint = Endpoint::from_shared(uri).map_err(|e| format!("--discovery-endpoints {text}: {e}"))?;
    let endpoint = match positive(settings.dial_timeout) {
        Some(limit) => endpoint.connect_timeout(limit),
        None => endpoint,
    };
    Ok(match positive(settings.keepalive_time) {
        Some(every) => endpoint
            .http2_keep_alive_interval(every.max(PING_INTERVAL_MIN))
            .keep_alive_timeout(settings.keepalive_timeout.to_std()),
        None => endpoint,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn refused(change: impl Fn(&mut Discovery), text: &str) -> Option<String> {
        let mut settings = Config::default().discovery;
        change(&mut settings);
        endpoint(&settings, text).err()
    }

    #[test]
    fn endpoints_are_written_with_or_without_scheme() {
        for text in ["http://h:1", "h:1", "127.0.0.1:1", "[::1]:1", "unix:///tmp/s", "unix:s"] {
            assert_eq!(refused(|_| {}, text), None, "{text}");
        }
        assert!(refused(|_| {}, "a b").unwrap().starts_with("--discovery-endpoints a b: "));
    }

    #[test]
    fn an_endpoint_that_wants_tls_is_not_spoken_to_without() {
        let tls = "TLS is not implemented yet; use http, or wait for it";
        assert_eq!(refused(|_| {}, "https://h:1"), Some(format!("--discovery-endpoints https://h:1: {tls}")));
        assert!(refused(|_| {}, "unixs:///s").is_some());
        let files: [fn(&mut Discovery) -> &mut String; 3] = [|s| &mut s.cert, |s| &mut s.key, |s| &mut s.cacert];
        for file in files {
            let with_file = |settings: &mut Discovery| *file(settings) = "f".into();
            assert_eq!(refused(with_file, "h:1"), Some(format!("--discovery-endpoints h:1: {tls}")));
            // What is said without doubt counts.
            assert_eq!(refused(with_file, "http://h:1"), None);
        }
        assert!(refused(|s| s.insecure_transport = false, "h:1").is_some());
        assert!(refused(|s| s.insecure_skip_tls_verify = true, "h:1").is_some());
    }

    #[test]
    fn a_password_stands_behind_the_name_or_by_itself() {
        let user = |user: &str, password: &str| {
            let settings = Discovery { user: user.into(), password: password.into(), ..Config::default().discovery };
            Service::new(&settings).unwrap().user.map(|user| (user.name, user.password))
        };
        let both = |name: &str, password: &str| Some((name.to_owned(), password.to_owned()));
        assert_eq!(user("a:b:c", ""), both("a", "b:c"));
        assert_eq!(user("a", "b"), both("a", "b"));
        assert_eq!(user("a:b", "c"), both("a:b", "c"));
        assert_eq!(user("a", ""), None);
        assert_eq!(user("", "b"), None);
    }

    #[test]
    fn the_range_of_the_members_ends_behind_the_prefix() {
        assert_eq!(prefix_end("/_etcd/registry/t/members"), b"/_etcd/registry/t/membert");
    }
}
