//! Who may call: the Host guard against pages that rebind a name to this machine, and CORS for
//! pages that ask openly.

use std::net::IpAddr;

use http::{HeaderMap, HeaderValue, Method, header};

/// Origins that may always call: pages of this machine and desktop programs.
const ORIGINS: [&str; 17] = [
    "http://localhost",
    "https://localhost",
    "http://localhost:*",
    "https://localhost:*",
    "http://127.0.0.1",
    "https://127.0.0.1",
    "http://127.0.0.1:*",
    "https://127.0.0.1:*",
    "http://0.0.0.0",
    "https://0.0.0.0",
    "http://0.0.0.0:*",
    "https://0.0.0.0:*",
    "app://*",
    "file://*",
    "tauri://*",
    "vscode-webview://*",
    "vscode-file://*",
];

/// Methods of the routes.
const METHODS: &str = "GET, POST, PUT, PATCH, DELETE, HEAD, OPTIONS";

/// Headers that clients in a page send: the usual ones, those of OpenAI's client, and Anthropic's.
const HEADERS: &str = "Authorization, Content-Type, User-Agent, Accept, X-Requested-With, OpenAI-Beta, \
     x-stainless-arch, x-stainless-async, x-stainless-custom-poll-interval, \
     x-stainless-helper-method, x-stainless-lang, x-stainless-os, x-stainless-package-version, \
     x-stainless-poll-helper, x-stainless-retry-count, x-stainless-runtime, \
     x-stainless-runtime-version, x-stainless-timeout, x-api-key, anthropic-version, \
     anthropic-beta, anthropic-dangerous-direct-browser-access";

/// Seconds that a browser may keep a preflight's answer.
const MAX_AGE_S: &str = "43200";

/// The rules of one daemon.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    /// The name of this machine.
    pub hostname: Option<String>,
    /// Whether the Host of a TCP request is looked at: where only this machine can connect.
    pub checks_host: bool,
}

/// What the guard says of a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on, and add these headers to the answer.
    Pass(HeaderMap),
    /// Answer 204 with these headers.
    Preflight(HeaderMap),
    /// Answer 403.
    Refuse,
}

impl Guard {
    /// Judges a request; `origins` may call beside the usual ones. A request over the unix socket
    /// has no Host worth looking at.
    pub fn judge(
        &self,
        method: &Method,
        headers: &HeaderMap,
        is_tcp: bool,
        origins: &[String],
    ) -> Verdict {
        let text = |name| headers.get(name).map(HeaderValue::to_str);
        let host = match text(header::HOST) {
            None => "",
            Some(Ok(host)) => host,
            Some(Err(_)) => return Verdict::Refuse,
        };
        if is_tcp && self.checks_host && !self.allows_host(host) {
            return Verdict::Refuse;
        }
        let mut out = HeaderMap::new();
        if let Some(origin) = headers.get(header::ORIGIN) {
            let allowed = origin.to_str().is_ok_and(|text| allows_origin(text, host, origins));
            if !allowed {
                return Verdict::Refuse;
            }
            out.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            out.insert(header::VARY, HeaderValue::from_static("Origin"));
        }
        if method != Method::OPTIONS {
            return Verdict::Pass(out);
        }
        out.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(METHODS));
        out.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(HEADERS));
        out.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(MAX_AGE_S));
        Verdict::Preflight(out)
    }

    fn allows_host(&self, host: &str) -> bool {
        let name = without_port(host).trim_end_matches('.').to_ascii_lowercase();
        if let Ok(ip) = name.parse::<IpAddr>() {
            return ip.is_loopback() || ip.is_unspecified() || is_private(ip);
        }
        name.is_empty()
            || name == "localhost"
            || self.hostname.as_ref().is_some_and(|own| own.eq_ignore_ascii_case(&name))
            || [".localhost", ".local", ".internal"].iter().any(|end| name.ends_with(end))
    }
}

fn allows_origin(origin: &str, host: &str, origins: &[String]) -> bool {
    let origin = origin.to_ascii_lowercase();
    let is_own = origin.split_once("://").is_some_and(|(scheme, rest)| {
        matches!(scheme, "http" | "https") && !host.is_empty() && rest.eq_ignore_ascii_case(host)
    });
    let further = origins.iter().map(String::as_str);
    is_own || further.chain(ORIGINS).any(|pattern| matches(pattern, &origin))
}

/// Whether a text fits a pattern with at most one `*`.
fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((start, end)) => {
            text.len() >= start.len() + end.len() && text.starts_with(start) && text.ends_with(end)
        }
    }
}

/// A Host without its port and without the brackets of an IPv6 address.
fn without_port(host: &str) -> &str {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split(']').next().unwrap_or_default();
    }
    match host.rsplit_once(':') {
        Some((name, _)) if !name.contains(':') => name,
        _ => host,
    }
}

fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_private() || ip.is_link_local(),
        IpAddr::V6(ip) => {
            let is_mapped =
                ip.to_ipv4_mapped().is_some_and(|v4| v4.is_private() || v4.is_loopback());
            ip.is_unique_local() || ip.is_unicast_link_local() || is_mapped
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(guard: &Guard, method: &Method, set: &[(&str, &str)], is_tcp: bool) -> Verdict {
        let mut headers = HeaderMap::new();
        for (name, value) in set {
            let name: header::HeaderName = name.parse().expect("a header name");
            headers.insert(name, HeaderValue::from_str(value).expect("a header value"));
        }
        guard.judge(method, &headers, is_tcp, &["https://*.example.org".to_owned()])
    }

    fn guard() -> Guard {
        Guard { hostname: Some("workbench".to_owned()), checks_host: true }
    }

    #[test]
    fn hosts_of_this_machine_pass_and_rebound_names_do_not() {
        for host in [
            "",
            "localhost",
            "localhost:11434",
            "127.0.0.1:1",
            "[::1]:11434",
            "0.0.0.0",
            "10.0.0.7",
            "192.168.1.4:80",
            "Workbench:11434",
            "a.local",
            "x.internal:1",
            "my.localhost.",
        ] {
            let verdict = judge(&guard(), &Method::GET, &[("host", host)], true);
            assert_eq!(verdict, Verdict::Pass(HeaderMap::new()), "{host}");
        }
        for host in ["evil.example", "evil.example:11434", "8.8.8.8", "localhost.evil.example"] {
            let verdict = judge(&guard(), &Method::GET, &[("host", host)], true);
            assert_eq!(verdict, Verdict::Refuse, "{host}");
            let verdict = judge(&guard(), &Method::GET, &[("host", host)], false);
            assert_eq!(verdict, Verdict::Pass(HeaderMap::new()), "over the unix socket: {host}");
            let open = Guard { checks_host: false, ..guard() };
            let verdict = judge(&open, &Method::GET, &[("host", host)], true);
            assert_eq!(verdict, Verdict::Pass(HeaderMap::new()), "bound to the network: {host}");
        }
    }

    #[test]
    fn pages_of_this_machine_and_named_ones_may_call() {
        for origin in [
            "http://localhost",
            "http://localhost:3000",
            "https://127.0.0.1:8443",
            "app://obsidian.md",
            "tauri://localhost",
            "vscode-webview://abc",
            "https://a.example.org",
        ] {
            let set = [("host", "localhost"), ("origin", origin)];
            let Verdict::Pass(headers) = judge(&guard(), &Method::POST, &set, true) else {
                panic!("refused {origin}")
            };
            assert_eq!(headers[header::ACCESS_CONTROL_ALLOW_ORIGIN], origin);
            assert_eq!(headers[header::VARY], "Origin");
        }
        for origin in [
            "https://evil.example",
            "null",
            "http://localhost.evil.example",
            "https://a.example.org.evil",
        ] {
            let set = [("host", "localhost"), ("origin", origin)];
            assert_eq!(judge(&guard(), &Method::POST, &set, true), Verdict::Refuse, "{origin}");
        }
        let set = [("host", "box.internal:1"), ("origin", "http://box.internal:1")];
        assert!(matches!(judge(&guard(), &Method::POST, &set, true), Verdict::Pass(_)));
    }

    #[test]
    fn a_preflight_is_answered() {
        let set = [("host", "localhost"), ("origin", "http://localhost:1")];
        let Verdict::Preflight(headers) = judge(&guard(), &Method::OPTIONS, &set, true) else {
            panic!("no preflight")
        };
        assert_eq!(headers[header::ACCESS_CONTROL_MAX_AGE], "43200");
        assert!(
            headers[header::ACCESS_CONTROL_ALLOW_HEADERS]
                .to_str()
                .expect("text")
                .contains("x-api-key")
        );
    }
}
