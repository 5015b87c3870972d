//! Allowed Host headers of the admin address, so that a web page cannot read it by DNS rebinding.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::Request;
use axum::http::uri::Authority;
use axum::http::{StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::Response;

use super::error_response;

/// The names that are accepted beside IP addresses and `localhost`, which no foreign page can have: `[admin] hosts`.
#[derive(Debug)]
pub(super) struct AllowedHosts(Vec<String>);

impl AllowedHosts {
    pub(super) fn new(names: Vec<String>) -> Arc<Self> {
        Arc::new(Self(names))
    }

    fn accepts(&self, authority: &Authority) -> bool {
        let host = authority.host();
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        // A name may end with the root's dot.
        let name = host.strip_suffix('.').unwrap_or(host);
        let is_known = |known: &str| name.eq_ignore_ascii_case(known);
        !authority.as_str().contains('@')
            && (bare.parse::<IpAddr>().is_ok()
                || is_known("localhost")
                || self.0.iter().any(|known| is_known(known)))
    }
}

/// The requested host, if any: that of the request target, else the Host header (RFC 9112, section
/// 3.2). Only HTTP/1.0 has requests without; no browser sends those.
fn requested_host(request: &Request) -> Result<Option<Authority>, String> {
    let shown = |value: &header::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (None, _) if request.version() == Version::HTTP_10 => None,
        (None, _) => return Err("none".to_owned()),
        (Some(_), Some(_)) => return Err("several".to_owned()),
        (Some(value), None) => {
            Some(value.to_str().ok().and_then(|text| text.parse().ok()).ok_or_else(|| shown(value))?)
        }
    };
    Ok(request.uri().authority().cloned().or(host))
}

/// Refuses requests whose Host header is not allowed.
pub(super) async fn only_allowed_hosts(hosts: Arc<AllowedHosts>, request: Request, next: Next) -> Response {
    let found = match requested_host(&request) {
        Ok(authority) => match authority.filter(|authority| !hosts.accepts(authority)) {
            None => return next.run(request).await,
            Some(authority) => authority.to_string(),
        },
        Err(found) => found,
    };
    let message = format!(
        "the Host header must be an IP address, \"localhost\" or a name in [admin] hosts, found \
         {found:?}: to allow another name, add it to [admin] hosts"
    );
    error_response(StatusCode::MISDIRECTED_REQUEST, message)
}

/// Refuses what a browser sends for a web page: no page gives orders. A browser names the page's origin in every request
/// that is not a plain GET (Fetch standard, section 3.2).
pub(super) async fn refuse_web_pages(request: Request, next: Next) -> Response {
    if request.headers().contains_key(header::ORIGIN) {
        let message =
            "requests from web pages are refused: found an Origin header; send the request without it";
        return error_response(StatusCode::FORBIDDEN, message);
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn request(version: Version, target: &str, hosts: &[&str]) -> Request {
        let mut request = Request::builder().version(version).uri(target);
        for host in hosts {
            request = request.header(header::HOST, *host);
        }
        request.body(Body::empty()).unwrap()
    }

    /// What is refused, where it is.
    fn refused(request: &Request) -> Option<String> {
        let hosts = AllowedHosts::new(vec!["proxy.internal".to_owned()]);
        match requested_host(request) {
            Ok(authority) => {
                authority.filter(|authority| !hosts.accepts(authority)).map(|name| name.to_string())
            }
            Err(found) => Some(found),
        }
    }

    #[test]
    fn addresses_localhost_and_configured_names_are_accepted() {
        for host in [
            "127.0.0.1:9900",
            "10.0.0.7",
            "[::1]:9900",
            "[fd00::1]",
            "localhost",
            "LocalHost:9900",
            "localhost.:1",
            "proxy.internal",
            "PROXY.internal:9900",
            "proxy.internal.",
        ] {
            assert_eq!(refused(&request(Version::HTTP_11, "/config", &[host])), None, "{host}");
        }
        assert_eq!(refused(&request(Version::HTTP_10, "/metrics", &[])), None);
    }

    #[test]
    fn other_names_are_refused() {
        for host in [
            "evil.example:9900",
            "proxy.internal.evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "127.0.0.1@evil.example",
            "evil.example@127.0.0.1",
            "2130706433",
            "",
        ] {
            assert_eq!(
                refused(&request(Version::HTTP_11, "/config", &[host])).as_deref(),
                Some(host),
                "{host}"
            );
        }
        let none = request(Version::HTTP_11, "/config", &[]);
        assert_eq!(refused(&none).as_deref(), Some("none"));
        let several = request(Version::HTTP_11, "/config", &["localhost", "evil.example"]);
        assert_eq!(refused(&several).as_deref(), Some("several"));
        // The target counts where it names a host (RFC 9112, section 3.2.2).
        let absolute = request(Version::HTTP_11, "http://evil.example/config", &["localhost"]);
        assert_eq!(refused(&absolute).as_deref(), Some("evil.example"));
    }
}
