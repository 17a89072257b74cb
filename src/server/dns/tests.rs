use simple_dns::{ResourceRecord, rdata::SRV};
use tokio::net::TcpListener;

use super::*;

/// A name, and priority, target and port of its records.
type Known<'a> = (&'a str, &'a [(u16, &'a str, u16)]);

/// A name server on loopback that knows these SRV records. Names it does not know do not exist, or are said to be
/// broken if they hold that word; what is longer than `limit` does not go into a datagram.
pub async fn name_server(known: &[Known<'_>], limit: usize) -> SocketAddr {
    let known: Vec<(String, Vec<Record>)> = known
        .iter()
        .map(|(name, records)| {
            let record = |(priority, target, port): &(u16, &str, u16)| Record {
                priority: *priority,
                weight: 0,
                target: (*target).to_owned(),
                port: *port,
            };
            ((*name).to_owned(), records.iter().map(record).collect())
        })
        .collect();
    let (udp, tcp) = loop {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        // The same port for both; another one if it is taken.
        if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
            break (udp, tcp);
        }
    };
    let server = udp.local_addr().unwrap();
    let for_streams = known.clone();
    tokio::spawn(async move {
        let mut datagram = [0; 512];
        while let Ok((length, from)) = udp.recv_from(&mut datagram).await {
            udp.send_to(b"noise", from).await.unwrap();
            let whole = answer(&known, &datagram[..length], false);
            let sent = if whole.len() > limit { answer(&known, &datagram[..length], true) } else { whole };
            udp.send_to(&sent, from).await.unwrap();
        }
    });
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = tcp.accept().await {
            let length = stream.read_u16().await.unwrap();
            let mut question = vec![0; length.into()];
            stream.read_exact(&mut question).await.unwrap();
            let answer = answer(&for_streams, &question, false);
            stream.write_u16(answer.len() as u16).await.unwrap();
            stream.write_all(&answer).await.unwrap();
        }
    });
    server
}

fn answer(known: &[(String, Vec<Record>)], question: &[u8], truncated: bool) -> Vec<u8> {
    let question = Packet::parse(question).unwrap();
    assert!(question.has_flags(PacketFlag::RECURSION_DESIRED));
    let asked = question.questions[0].clone();
    let name = asked.qname.to_string();
    let mut packet = Packet::new_reply(question.id());
    packet.questions.push(asked.clone());
    let found = known.iter().find(|(of, _)| *of == name);
    *packet.rcode_mut() = match (found, name.contains("broken")) {
        (Some(_), _) => RCODE::NoError,
        (None, true) => RCODE::ServerFailure,
        (None, false) => RCODE::NameError,
    };
    if truncated {
        packet.set_flags(PacketFlag::TRUNCATION);
    } else {
        for record in found.iter().flat_map(|(_, records)| records) {
            let target = Name::new(record.target.trim_end_matches('.')).unwrap();
            let srv = SRV { priority: record.priority, weight: record.weight, port: record.port, target };
            packet.answers.push(ResourceRecord::new(asked.qname.clone(), CLASS::IN, 60, RData::SRV(srv)));
        }
    }
    packet.build_bytes_vec_compressed().unwrap()
}

pub fn asking(servers: &[SocketAddr]) -> Resolver {
    Resolver { servers: servers.to_vec(), search: Vec::new(), ndots: 1, timeout: Duration::from_secs(5), attempts: 1 }
}

#[tokio::test]
async fn records_come_by_priority_from_datagrams_and_streams() {
    let records: &[(u16, &str, u16)] = &[(2, "b.example.org", 2), (1, "a.example.org", 1), (2, "a.example.org", 3)];
    for limit in [512, 0] {
        let server = name_server(&[("_s._tcp.example.org", records)], limit).await;
        let found = asking(&[server]).srv("_s._tcp.example.org").await.unwrap();
        let found: Vec<_> = found.iter().map(|r| (r.priority, r.target.as_str(), r.port)).collect();
        assert_eq!(found, [(1, "a.example.org.", 1), (2, "a.example.org.", 3), (2, "b.example.org.", 2)]);
    }
}

#[tokio::test]
async fn what_is_not_there_is_said_by_name_and_server() {
    let server = name_server(&[("empty.org", &[])], 512).await;
    let resolver = asking(&[server]);
    for name in ["nobody.org", "empty.org", "nobody.org."] {
        assert_eq!(resolver.srv(name).await.unwrap_err(), format!("lookup {name} on {server}: no such host"));
    }
    let broken = resolver.srv("broken.org").await.unwrap_err();
    assert_eq!(broken, format!("lookup broken.org on {server}: server misbehaving"));
    let long = format!("{}.org", "x".repeat(64));
    assert_eq!(resolver.srv(&long).await.unwrap_err(), format!("lookup {long} on {server}: no such host"));
}

#[tokio::test]
async fn another_server_is_asked_when_one_does_not_answer_or_does_not_know() {
    let silent_socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let silent = silent_socket.local_addr().unwrap();
    let empty = name_server(&[], 512).await;
    let good = name_server(&[("broken.org", &[(0, "a", 1)]), ("x.org", &[(0, "a", 1)])], 512).await;
    let mut resolver = asking(&[silent, good]);
    resolver.timeout = Duration::from_millis(200);
    assert_eq!(resolver.srv("x.org").await.unwrap().len(), 1);
    assert_eq!(asking(&[empty, good]).srv("broken.org").await.unwrap().len(), 1);
    // A server that knows there is nothing is believed.
    assert!(asking(&[empty, good]).srv("x.org").await.unwrap_err().ends_with("no such host"));
    resolver.servers = vec![silent];
    assert_eq!(resolver.srv("x.org").await.unwrap_err(), format!("lookup x.org on {silent}: i/o timeout"));
}

#[tokio::test]
async fn short_names_are_searched_for() {
    let server = name_server(&[("_s._tcp.db.here.org", &[(0, "a", 1)])], 512).await;
    let mut resolver = asking(&[server]);
    resolver.search = vec!["there.org".into(), "here.org.".into()];
    assert_eq!(resolver.srv("_s._tcp.db").await.unwrap().len(), 1);
    assert_eq!(resolver.candidates("a.b"), ["a.b", "a.b.there.org", "a.b.here.org"]);
    assert_eq!(resolver.candidates("a.b."), ["a.b"]);
    resolver.ndots = 5;
    assert_eq!(resolver.candidates("a.b"), ["a.b.there.org", "a.b.here.org", "a.b"]);
    resolver.search.clear();
    let error = resolver.srv("_s._tcp.db").await.unwrap_err();
    assert_eq!(error, format!("lookup _s._tcp.db on {server}: no such host"));
}

#[test]
fn the_systems_configuration_is_read_as_far_as_it_goes() {
    let text = b"nonsense\nnameserver 10.0.0.1\nnameserver x\nnameserver fd00::1 # comment\nsearch a.org b.org\n\
                 nameserver 10.0.0.2\nnameserver 10.0.0.3\noptions ndots:5 attempts:3 timeout:2 whatever\n";
    assert_eq!(
        Resolver::parse(text),
        Resolver {
            servers: ["10.0.0.1:53", "[fd00::1]:53", "10.0.0.2:53"].map(|text| text.parse().unwrap()).to_vec(),
            search: vec!["a.org".into(), "b.org".into()],
            ndots: 5,
            timeout: Duration::from_secs(2),
            attempts: 3,
        }
    );
    let none = Resolver::parse(b"");
    assert_eq!(none.servers, ["127.0.0.1:53", "[::1]:53"].map(|text| text.parse().unwrap()));
    assert_eq!((none.ndots, none.timeout, none.attempts), (1, Duration::from_secs(5), 2));
}

#[test]
fn messages_of_any_content_are_read_without_a_panic() {
    use rand::{RngExt, SeedableRng, rngs::StdRng};
    let name = "_s._tcp.example.org";
    let known = [(name.to_owned(), vec![Record { priority: 1, weight: 2, target: "a.example.org.".into(), port: 3 }])];
    let good = answer(&known, &question(7, name).unwrap(), false);
    assert!(matches!(read(7, name, &good), Some(Answer::Records(_))));
    assert!(read(8, name, &good).is_none());
    assert!(read(7, "_s._tcp.example.com", &good).is_none());
    assert!(read(7, name, &question(7, name).unwrap()).is_none());
    let mut random = StdRng::seed_from_u64(1);
    for _ in 0..20_000 {
        let mut message = good.clone();
        for _ in 0..random.random_range(1..6) {
            let at = random.random_range(0..message.len());
            message[at] = random.random();
        }
        message.truncate(random.random_range(0..=message.len()));
        let _ = read(7, name, &message);
    }
}
