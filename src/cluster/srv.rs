//! Finding the first members through DNS: SRV records of a domain name the hosts and ports of all, of those that speak
//! TLS and of those that do not.
//!
//! Here: the services' names and what their records mean. Asking is the shell's (`server::srv`).

/// One SRV record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    pub priority: u16,
    pub weight: u16,
    /// Ends with a dot.
    pub target: String,
    pub port: u16,
}

impl Record {
    /// As in a URL, where names do not end with a dot.
    pub fn host_and_port(&self) -> String {
        joined(self.target.strip_suffix('.').unwrap_or(&self.target), self.port)
    }
}

fn joined(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// A peer URL that this member tells others, and the address it resolves to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advertised {
    pub address: String,
    pub scheme: String,
    pub url: String,
}

/// The services of members that speak TLS and of those that do not: scheme and name.
pub fn services(suffix: &str) -> [(&'static str, String); 2] {
    let named = |service: &str| match suffix {
        "" => service.to_owned(),
        _ => format!("{service}-{suffix}"),
    };
    [("https", named("etcd-server-ssl")), ("http", named("etcd-server"))]
}

/// What the records of one service say, as `name=url` each. `resolve` gives a record's address, of which there may be
/// none; this member is found by its address and gets its name, the others are numbered. Records that cannot be used are
/// left out as long as one can; else the last reason is the error.
pub fn members(
    (scheme, service): (&str, &str),
    name: &str,
    advertised: &[Advertised],
    records: &[Record],
    resolve: impl Fn(&Record) -> Result<String, String>,
) -> Result<Vec<String>, String> {
    let mut members = Vec::new();
    let mut numbered = 0;
    let mut problem = None;
    for record in records {
        let address = match resolve(record) {
            Ok(address) => address,
            Err(reason) => {
                problem = Some(reason);
                continue;
            }
        };
        let url = format!("{scheme}://{}", record.host_and_port());
        // Of two URLs with one address, the later one is compared.
        let own = advertised.iter().rfind(|own| own.address == address);
        let member = match own {
            Some(_) if !name.is_empty() => name.to_owned(),
            _ => {
                numbered += 1;
                (numbered - 1).to_string()
            }
        };
        match own {
            Some(own) if own.scheme != scheme => {
                problem = Some(format!(
                    "bootstrap at {url} from DNS for {service} has scheme mismatch with expected peer {}",
                    own.url
                ));
            }
            _ => members.push(format!("{member}={url}")),
        }
    }
    match problem {
        Some(reason) if members.is_empty() => Err(failed(service, &reason)),
        _ => Ok(members),
    }
}

/// The text of a service whose records say nothing.
pub fn failed(service: &str, reason: &str) -> String {
    format!("error querying DNS SRV records for _{service} {reason}")
}

/// The list of members that both services' answers make. One that failed is no harm while the other names somebody.
pub fn list(answers: Vec<Result<Vec<String>, String>>) -> Result<String, String> {
    let (found, failed): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
    let found: Vec<String> = found.into_iter().flatten().flatten().collect();
    let failed: Vec<String> = failed.into_iter().filter_map(Result::err).collect();
    if found.is_empty() && !failed.is_empty() { Err(failed.join("\n")) } else { Ok(found.join(",")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: (&str, &str) = ("http", "etcd-server");

    fn record(target: &str, port: u16) -> Record {
        Record { priority: 0, weight: 0, target: target.into(), port }
    }

    fn own(address: &str, url: &str) -> Advertised {
        let scheme = url.split(':').next().unwrap().to_owned();
        Advertised { address: address.into(), scheme, url: url.into() }
    }

    /// `a.` has the address 1.1.1.1, `b.` 1.1.1.2 and so on.
    fn resolve(record: &Record) -> Result<String, String> {
        match record.target.as_bytes() {
            [letter @ b'a'..=b'f', b'.'] => Ok(format!("1.1.1.{}:{}", letter - b'a' + 1, record.port)),
            _ => Err(format!("lookup {}: no such host", record.target)),
        }
    }

    #[test]
    fn services_have_a_suffix_behind_a_hyphen() {
        // limits.md 17
        assert_eq!(services(""), [("https", "etcd-server-ssl".into()), ("http", "etcd-server".into())]);
        assert_eq!(services("x"), [("https", "etcd-server-ssl-x".into()), ("http", "etcd-server-x".into())]);
    }

    #[test]
    fn this_member_is_known_by_its_address_and_the_others_are_numbered() {
        let records = [record("a.", 1), record("b.", 1), record("c.", 1)];
        let found = members(PLAIN, "me", &[own("1.1.1.2:1", "http://other:1")], &records, resolve);
        assert_eq!(found.unwrap(), ["0=http://a:1", "me=http://b:1", "1=http://c:1"]);
        // The same host with another port is another member.
        let found = members(PLAIN, "me", &[own("1.1.1.2:2", "http://b:2")], &records, resolve);
        assert_eq!(found.unwrap(), ["0=http://a:1", "1=http://b:1", "2=http://c:1"]);
        assert_eq!(
            members(PLAIN, "", &[own("1.1.1.1:1", "http://a:1")], &records[..1], resolve).unwrap(),
            ["0=http://a:1"]
        );
        assert_eq!(members(PLAIN, "me", &[], &[], resolve), Ok(Vec::new()));
    }

    #[test]
    fn records_that_cannot_be_used_are_left_out_while_one_can() {
        let records = [record("zz.", 1), record("b.", 1), record("yy.", 1)];
        assert_eq!(members(PLAIN, "me", &[], &records, resolve).unwrap(), ["0=http://b:1"]);
        let none = [record("zz.", 1), record("yy.", 1)];
        assert_eq!(
            members(PLAIN, "me", &[], &none, resolve).unwrap_err(),
            "error querying DNS SRV records for _etcd-server lookup yy.: no such host"
        );
        let plain = [own("1.1.1.2:1", "http://b:1")];
        let secure = ("https", "etcd-server-ssl");
        assert_eq!(
            members(secure, "me", &plain, &records[1..2], resolve).unwrap_err(),
            "error querying DNS SRV records for _etcd-server-ssl bootstrap at https://b:1 from DNS for etcd-server-ssl \
             has scheme mismatch with expected peer http://b:1"
        );
        let others = [record("b.", 1), record("c.", 1)];
        assert_eq!(members(secure, "me", &plain, &others, resolve).unwrap(), ["0=https://c:1"]);
    }

    #[test]
    fn one_service_is_enough() {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let failed = |text: &str| Err(text.to_owned());
        assert_eq!(
            list(vec![failed("x"), Ok(texts(&["a=http://a:1", "0=http://b:1"]))]).unwrap(),
            "a=http://a:1,0=http://b:1"
        );
        assert_eq!(list(vec![Ok(texts(&["0=https://b:1"])), failed("x")]).unwrap(), "0=https://b:1");
        let both = list(vec![Ok(texts(&["0=https://b:1"])), Ok(texts(&["0=http://b:2"]))]);
        assert_eq!(both.unwrap(), "0=https://b:1,0=http://b:2");
        assert_eq!(list(vec![failed("x"), failed("y")]).unwrap_err(), "x\ny");
        assert_eq!(list(vec![Ok(Vec::new()), Ok(Vec::new())]).unwrap(), "");
    }

    #[test]
    fn addresses_of_six_words_are_in_brackets() {
        assert_eq!(record("::1", 5).host_and_port(), "[::1]:5");
        assert_eq!(record("h.", 5).host_and_port(), "h:5");
    }
}
