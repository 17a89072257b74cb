//! A small resolver for SRV records, which the system's own functions do not look up. Servers and search list are those of
//! `/etc/resolv.conf`. Addresses are asked of the system, which also knows `/etc/hosts`.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use simple_dns::{CLASS, Name, Packet, PacketFlag, Question, RCODE, TYPE, rdata::RData};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use crate::cluster::srv::Record;

const CONFIGURATION: &str = "/etc/resolv.conf";
const PORT: u16 = 53;
/// As many servers as the system's resolver asks.
const SERVERS_MAX: usize = 3;
/// A datagram without extensions has 512 bytes at most; larger ones are read all the same.
const DATAGRAM_MAX: usize = 4096;
const NO_SUCH_HOST: &str = "no such host";

/// Whom to ask, and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolver {
    pub servers: Vec<SocketAddr>,
    /// Domains that names with few dots may be in.
    pub search: Vec<String>,
    /// From so many dots on a name is first taken as it is.
    pub ndots: usize,
    /// For one server's answer.
    pub timeout: Duration,
    pub attempts: u32,
}

/// What one server said.
enum Answer {
    Records(Vec<Record>),
    /// It does not exist, or not with such records.
    Nothing,
    /// Too long for a datagram.
    Truncated,
    /// Another server may know better.
    Failed(&'static str),
}

impl Resolver {
    pub fn system() -> Self {
        // Without the file, a server on this machine is asked; lines that say nothing are passed over.
        Self::parse(&std::fs::read(CONFIGURATION).unwrap_or_default())
    }

    fn parse(text: &[u8]) -> Self {
        let (found, _) = resolv_conf::Config::parse_with_errors(text);
        let server = |ip: &resolv_conf::ScopedIp| SocketAddr::new(ip.into(), PORT);
        Self {
            servers: found.get_nameservers_or_local().iter().take(SERVERS_MAX).map(server).collect(),
            search: found.get_last_search_or_domain().cloned().collect(),
            ndots: found.ndots as usize,
            timeout: Duration::from_secs(found.timeout.max(1).into()),
            attempts: found.attempts.max(1),
        }
    }

    /// The SRV records of a name, by priority.
    pub async fn srv(&self, name: &str) -> Result<Vec<Record>, String> {
        let mut problem = NO_SUCH_HOST.to_owned();
        for candidate in self.candidates(name) {
            match self.ask_all(&candidate).await {
                Ok(mut records) => {
                    records.sort();
                    return Ok(records);
                }
                Err(reason) => problem = reason,
            }
        }
        Err(format!("lookup {name}{problem}"))
    }

    /// The names meant by `name`, in the order in which they are tried.
    fn candidates(&self, name: &str) -> Vec<String> {
        if let Some(absolute) = name.strip_suffix('.') {
            return vec![absolute.to_owned()];
        }
        let searched = self.search.iter().map(|domain| format!("{name}.{}", domain.trim_end_matches('.')));
        let has_dots = name.matches('.').count() >= self.ndots;
        let first = has_dots.then(|| name.to_owned());
        let last = (!has_dots).then(|| name.to_owned());
        first.into_iter().chain(searched).chain(last).collect()
    }

    /// The first useful answer; an error begins with who gave it.
    async fn ask_all(&self, name: &str) -> Result<Vec<Record>, String> {
        let mut problem = String::new();
        for server in (0..self.attempts).flat_map(|_| &self.servers) {
            let reason = match timeout(self.timeout, ask(*server, name)).await {
                Ok(Ok(Answer::Records(records))) => return Ok(records),
                Ok(Ok(Answer::Nothing)) => return Err(format!(" on {server}: {NO_SUCH_HOST}")),
                Ok(Ok(Answer::Truncated)) => "answer too long".to_owned(),
                Ok(Ok(Answer::Failed(reason))) => reason.to_owned(),
                Ok(Err(e)) => e.to_string(),
                Err(_) => "i/o timeout".to_owned(),
            };
            problem = format!(" on {server}: {reason}");
        }
        Err(problem)
    }
}

/// Asks by datagram, and by stream for what is too long for one.
async fn ask(server: SocketAddr, name: &str) -> std::io::Result<Answer> {
    // Hard to guess for somebody who would answer in the server's place, as is the port.
    let id = RandomState::new().build_hasher().finish() as u16;
    let Some(question) = question(id, name) else { return Ok(Answer::Nothing) };
    let local: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((local, 0)).await?;
    socket.connect(server).await?;
    socket.send(&question).await?;
    let mut datagram = vec![0; DATAGRAM_MAX];
    let answer = loop {
        let length = socket.recv(&mut datagram).await?;
        // Datagrams of others, and answers to earlier questions, are passed over.
        if let Some(answer) = read(id, name, &datagram[..length]) {
            break answer;
        }
    };
    if !matches!(answer, Answer::Truncated) {
        return Ok(answer);
    }
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(question.len()).expect("a question is a name of at most 255 bytes and little more");
    stream.write_all(&[&length.to_be_bytes()[..], &question].concat()).await?;
    let length = stream.read_u16().await?;
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(read(id, name, &message).unwrap_or(Answer::Failed("cannot unmarshal DNS message")))
}

/// `None` for what cannot be a name.
fn question(id: u16, name: &str) -> Option<Vec<u8>> {
    let mut packet = Packet::new_query(id);
    packet.set_flags(PacketFlag::RECURSION_DESIRED);
    packet.questions.push(Question::new(Name::new(name).ok()?, TYPE::SRV.into(), CLASS::IN.into(), false));
    packet.build_bytes_vec().ok()
}

/// `None` for what is no answer to this question.
fn read(id: u16, name: &str, message: &[u8]) -> Option<Answer> {
    let packet = Packet::parse(message).ok()?;
    let asked = packet.questions.first()?;
    let is_this = packet.id() == id
        && packet.has_flags(PacketFlag::RESPONSE)
        && asked.qtype == TYPE::SRV.into()
        && asked.qname.to_string().eq_ignore_ascii_case(&Name::new(name).ok()?.to_string());
    if !is_this {
        return None;
    }
    if packet.has_flags(PacketFlag::TRUNCATION) {
        return Some(Answer::Truncated);
    }
    match packet.rcode() {
        RCODE::NoError => {}
        RCODE::NameError => return Some(Answer::Nothing),
        _ => return Some(Answer::Failed("server misbehaving")),
    }
    let record = |data: &RData| match data {
        RData::SRV(srv) => Some(Record {
            priority: srv.priority,
            weight: srv.weight,
            target: format!("{}.", srv.target),
            port: srv.port,
        }),
        _ => None,
    };
    let records: Vec<Record> = packet.answers.iter().filter_map(|answer| record(&answer.rdata)).collect();
    Some(if records.is_empty() { Answer::Nothing } else { Answer::Records(records) })
}

/// Where `host:port` is; of several addresses one that everything speaks.
pub async fn address(host_and_port: &str) -> Result<SocketAddr, String> {
    let host = host_and_port.rsplit_once(':').map_or(host_and_port, |(host, _)| host);
    if host.is_empty() {
        // How a domain says that it does not have the service.
        return Err(format!("lookup .: {NO_SUCH_HOST}"));
    }
    let found = tokio::net::lookup_host(host_and_port).await.map_err(|e| format!("lookup {host}: {e}"))?;
    let found: Vec<SocketAddr> = found.collect();
    let best = found.iter().find(|address| address.is_ipv4()).or(found.first());
    best.copied().ok_or_else(|| format!("lookup {host}: {NO_SUCH_HOST}"))
}

#[cfg(test)]
pub(super) mod tests;
