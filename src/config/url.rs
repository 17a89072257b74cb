//! URLs that name listeners and members: a scheme and `host:port`, or a socket path.

use std::fmt;
use std::net::IpAddr;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scheme {
    Http,
    Https,
    Unix,
    Unixs,
}

/// A checked URL. Ordered by its text, as lists of URLs are.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Url {
    /// As written, with the scheme in lower case.
    text: String,
    scheme: Scheme,
    /// `host:port`; for sockets the part before the path, often empty.
    authority: String,
    path: String,
}

impl Url {
    pub fn parse(text: &str) -> Result<Url, String> {
        let text = text.trim();
        let malformed = |reason: String| format!("parse {text:?}: {reason}");
        if text.chars().any(|c| c.is_ascii_control()) {
            return Err(malformed("net/url: invalid control character in URL".into()));
        }
        let (scheme, rest) = split_scheme(text).map_err(malformed)?;
        let end = rest.find(['?', '#']).unwrap_or(rest.len());
        let hierarchy = &rest[..end];
        let (authority, path) = match hierarchy.strip_prefix("//") {
            Some(after) => after.split_at(after.find('/').unwrap_or(after.len())),
            None => ("", hierarchy),
        };
        let authority = authority.rsplit_once('@').map_or(authority, |(_user, host)| host);
        check_authority(authority).map_err(malformed)?;
        check_escapes(path).map_err(malformed)?;
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            "unix" => Scheme::Unix,
            "unixs" => Scheme::Unixs,
            _ => return Err(format!("URL scheme must be http, https, unix, or unixs: {text}")),
        };
        let url =
            Url { text: format!("{scheme}:{rest}"), scheme, authority: authority.to_owned(), path: path.to_owned() };
        if !url.is_socket() {
            if url.host_and_port().is_none() {
                return Err(format!("URL address does not have the form \"host:port\": {text}"));
            }
            if !path.is_empty() {
                return Err(format!("URL must not contain a path: {text}"));
            }
        }
        Ok(url)
    }

    /// A comma-separated list, sorted and without duplicates. The empty text is the empty list.
    pub fn parse_list(text: &str) -> Result<Vec<Url>, String> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let mut urls = text.split(',').map(Url::parse).collect::<Result<Vec<_>, _>>()?;
        urls.sort();
        urls.dedup();
        Ok(urls)
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// `https` and `unixs` speak TLS.
    pub fn is_secure(&self) -> bool {
        matches!(self.scheme, Scheme::Https | Scheme::Unixs)
    }

    pub fn is_socket(&self) -> bool {
        matches!(self.scheme, Scheme::Unix | Scheme::Unixs)
    }

    /// `host:port` as written.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// File of a `unix` or `unixs` URL: `unix://localhost:20000` is the relative file `localhost:20000`.
    pub fn socket_path(&self) -> String {
        format!("{}{}", self.authority, self.path)
    }

    /// Without the brackets of an IPv6 address.
    pub fn host(&self) -> &str {
        self.host_and_port().map_or(self.authority.as_str(), |(host, _)| host)
    }

    pub fn port(&self) -> &str {
        self.host_and_port().map_or("", |(_, port)| port)
    }

    /// The same URL with another host.
    pub fn with_host(&self, host: &str) -> Url {
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        let authority = format!("{host}:{}", self.port());
        Url { text: format!("{}://{authority}", self.scheme), scheme: self.scheme, authority, path: String::new() }
    }

    fn host_and_port(&self) -> Option<(&str, &str)> {
        let (host, port) = self.authority.rsplit_once(':')?;
        match host.strip_prefix('[') {
            Some(inner) => Some((inner.strip_suffix(']')?, port)),
            None if host.contains(':') => None,
            None => Some((host, port)),
        }
    }

    /// Whether a listener can be bound to it: names other than localhost would need a resolver.
    pub fn check_for_binding(&self) -> Result<(), String> {
        if self.is_socket() || self.host() == "localhost" || self.host().parse::<IpAddr>().is_ok() {
            return Ok(());
        }
        Err(format!("expected IP in URL for binding ({self})"))
    }

    /// Whether others can dial it.
    pub fn check_for_dialling(&self) -> Result<(), String> {
        if !self.is_socket() && self.host().is_empty() {
            return Err(format!("unexpected empty host ({self})"));
        }
        Ok(())
    }

    /// Whether a listener on it hears every interface.
    pub fn is_wildcard(&self) -> bool {
        self.host().parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified())
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Scheme::Http => "http",
            Scheme::Https => "https",
            Scheme::Unix => "unix",
            Scheme::Unixs => "unixs",
        })
    }
}

/// The URLs with commas between.
pub fn join(urls: &[Url]) -> String {
    urls.iter().map(Url::as_str).collect::<Vec<_>>().join(",")
}

/// Scheme and what follows its colon; an empty scheme if there is none.
fn split_scheme(text: &str) -> Result<(&str, &str), String> {
    let end = text.find(|c: char| !(c.is_ascii_alphanumeric() || "+-.".contains(c))).unwrap_or(text.len());
    if text[end..].starts_with(':') && text.starts_with(|c: char| c.is_ascii_alphabetic()) {
        return Ok((&text[..end], &text[end + 1..]));
    }
    if text.starts_with(':') {
        return Err("missing protocol scheme".into());
    }
    let first_segment = text.split(['/', '?', '#']).next().unwrap_or_default();
    check_escapes(first_segment)?;
    if first_segment.contains(':') {
        return Err("first path segment in URL cannot contain colon".into());
    }
    Ok(("", text))
}

fn check_authority(authority: &str) -> Result<(), String> {
    let port = match authority.strip_prefix('[') {
        Some(inner) => {
            let end = inner.find(']').ok_or("missing ']' in host")?;
            &inner[end + 1..]
        }
        None => &authority[authority.find(':').unwrap_or(authority.len())..],
    };
    let is_port = port.is_empty() || port.strip_prefix(':').is_some_and(|p| p.bytes().all(|b| b.is_ascii_digit()));
    if !is_port {
        return Err(format!("invalid port {port:?} after host"));
    }
    match authority.chars().find(|c| " <>\"\\^`{}|".contains(*c)) {
        Some(c) => Err(format!("invalid character {:?} in host name", c.to_string())),
        None => Ok(()),
    }
}

fn check_escapes(path: &str) -> Result<(), String> {
    for (at, _) in path.match_indices('%') {
        let digits = path[at + 1..].chars().take_while(char::is_ascii_hexdigit).take(2).count();
        if digits < 2 {
            let shown: String = path[at..].chars().take(3).collect();
            return Err(format!("invalid URL escape {shown:?}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_urls_keep_their_parts() {
        let cases = [
            ("http://127.0.0.1:2379", "http://127.0.0.1:2379", "127.0.0.1", "2379"),
            (" HTTP://LocalHost:1 ", "http://LocalHost:1", "LocalHost", "1"),
            ("https://[::1]:2379", "https://[::1]:2379", "::1", "2379"),
            ("http://:80", "http://:80", "", "80"),
            ("http://a:", "http://a:", "a", ""),
            ("http://h:1?x=1", "http://h:1?x=1", "h", "1"),
        ];
        for (text, shown, host, port) in cases {
            let url = Url::parse(text).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!((url.as_str(), url.host(), url.port()), (shown, host, port));
        }
    }

    #[test]
    fn sockets_are_named_by_authority_and_path() {
        for (text, file) in [
            ("unix://localhost:20000", "localhost:20000"),
            ("unix:///var/run/x.sock", "/var/run/x.sock"),
            ("unixs://dir/x", "dir/x"),
            ("unix:/var/run/x.sock", "/var/run/x.sock"),
        ] {
            let url = Url::parse(text).unwrap_or_else(|e| panic!("{e}"));
            assert!(url.is_socket());
            assert_eq!(url.socket_path(), file);
        }
    }

    #[test]
    fn bad_urls_say_what_is_wrong() {
        let cases = [
            ("foo", "URL scheme must be http, https, unix, or unixs: foo"),
            ("", "URL scheme must be http, https, unix, or unixs: "),
            ("ftp://h:1", "URL scheme must be http, https, unix, or unixs: ftp://h:1"),
            ("localhost:2379", "URL scheme must be http, https, unix, or unixs: localhost:2379"),
            ("http://127.0.0.1", r#"URL address does not have the form "host:port": http://127.0.0.1"#),
            ("http:/127.0.0.1", r#"URL address does not have the form "host:port": http:/127.0.0.1"#),
            ("http:127.0.0.1:1", r#"URL address does not have the form "host:port": http:127.0.0.1:1"#),
            ("http://127.0.0.1:1/a", "URL must not contain a path: http://127.0.0.1:1/a"),
            ("http://127.0.0.1:1/", "URL must not contain a path: http://127.0.0.1:1/"),
            ("127.0.0.1:2379", r#"parse "127.0.0.1:2379": first path segment in URL cannot contain colon"#),
            (":1", r#"parse ":1": missing protocol scheme"#),
            ("http://127.0.0.1:x", r#"parse "http://127.0.0.1:x": invalid port ":x" after host"#),
            ("http://[::1", r#"parse "http://[::1": missing ']' in host"#),
            ("http://a b:1", r#"parse "http://a b:1": invalid character " " in host name"#),
            ("%zz", r#"parse "%zz": invalid URL escape "%zz""#),
        ];
        for (text, error) in cases {
            assert_eq!(Url::parse(text).unwrap_err(), error);
        }
    }

    #[test]
    fn lists_are_sorted_and_free_of_duplicates() {
        let urls = Url::parse_list("http://b:1, http://a:1,http://b:1").expect("valid");
        assert_eq!(join(&urls), "http://a:1,http://b:1");
        assert_eq!(Url::parse_list(""), Ok(vec![]));
        assert!(Url::parse_list("http://a:1,").is_err());
    }

    #[test]
    fn listeners_need_an_address_and_members_a_host() {
        let url = |text| Url::parse(text).expect("valid");
        assert_eq!(
            url("http://a.b:1").check_for_binding().unwrap_err(),
            "expected IP in URL for binding (http://a.b:1)"
        );
        assert!(url("http://:1").check_for_binding().is_err());
        for text in ["http://localhost:1", "http://0.0.0.0:1", "http://[::]:1", "unix://a/b"] {
            assert_eq!(url(text).check_for_binding(), Ok(()), "{text}");
        }
        assert_eq!(url("http://:1").check_for_dialling().unwrap_err(), "unexpected empty host (http://:1)");
        assert_eq!(url("http://a.b:1").check_for_dialling(), Ok(()));
    }
}
