//! From the words of a setting to its value. An error says what the words must be.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroU64,
    path::PathBuf,
    str::FromStr,
};

use tracing::level_filters::LevelFilter;
use v4_proto::frame::{KvType, Precision};
use v4_supervisor::KeepAlive;

use super::{DEFAULT_PORT, LogFormat, World};
use crate::api;

type Parsed<T> = Result<T, &'static str>;

/// A value that is always said, by its default at least.
fn value<T: FromStr>(text: Option<&str>, expected: &'static str) -> Parsed<T> {
    text.unwrap_or_default().parse().map_err(|_| expected)
}

/// `ADDRESS:PORT`, an address, a port, `localhost` for the address, or `off`.
pub fn listen(text: Option<&str>, _: &World) -> Parsed<Option<SocketAddr>> {
    let value = text.unwrap_or("off");
    if value == "off" {
        return Ok(None);
    }
    let plain = value.strip_prefix("http://").unwrap_or(value).trim_end_matches('/');
    let plain = plain.replacen("localhost", "127.0.0.1", 1);
    let address = plain
        .parse()
        .or_else(|_| plain.parse().map(|host: IpAddr| SocketAddr::new(host, DEFAULT_PORT)))
        .or_else(|_| {
            let port = plain.strip_prefix(':').unwrap_or(&plain).parse();
            port.map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
        });
    address.map(Some).map_err(|_| "an address and port such as 127.0.0.1:11434, a port, or off")
}

pub fn keep_alive(text: Option<&str>, _: &World) -> Parsed<KeepAlive> {
    let value = api::keep_alive::parse_text(text.unwrap_or_default());
    value
        .ok()
        .flatten()
        .ok_or("a number of seconds or a duration such as 5m; a negative one is for ever")
}

const WHOLE: &str = "a whole number";

pub fn count(text: Option<&str>, _: &World) -> Parsed<u32> {
    value(text, WHOLE)
}

pub fn queue(text: Option<&str>, _: &World) -> Parsed<usize> {
    value(text, WHOLE)
}

/// Fewer tokens than 64 hold no question.
pub fn context(text: Option<&str>, _: &World) -> Parsed<u32> {
    value(text, WHOLE).map(|n: u32| n.max(64))
}

pub fn slots(text: Option<&str>, _: &World) -> Parsed<u32> {
    value(text, WHOLE).map(|n: u32| n.max(1))
}

pub fn kv_type(text: Option<&str>, _: &World) -> Parsed<KvType> {
    value(text, "f16, bf16 or q8_0")
}

pub fn precision(text: Option<&str>, _: &World) -> Parsed<Precision> {
    value(text, "fast or quality")
}

pub fn level(text: Option<&str>, _: &World) -> Parsed<LevelFilter> {
    value(text, "error, warn, info, debug, trace or off")
}

pub fn log_format(text: Option<&str>, _: &World) -> Parsed<LogFormat> {
    match text {
        Some("text") => Ok(LogFormat::Text),
        Some("json") => Ok(LogFormat::Json),
        _ => Err("text or json"),
    }
}

/// Bytes, or `off`.
pub fn amount(text: Option<&str>, _: &World) -> Parsed<Option<u64>> {
    match text {
        None | Some("off") => Ok(None),
        Some(value) => bytes(value).map(Some).ok_or("a number of bytes such as 800M or 6G, or off"),
    }
}

/// Bytes a second; none is without a bound.
pub fn rate(text: Option<&str>, _: &World) -> Parsed<Option<NonZeroU64>> {
    let Some(value) = text else { return Ok(None) };
    bytes(value).map(NonZeroU64::new).ok_or("a number of bytes a second such as 2M or 500K")
}

pub fn switch(text: Option<&str>, _: &World) -> Parsed<bool> {
    match text {
        Some("off" | "0" | "false") => Ok(false),
        Some("on" | "1" | "true") => Ok(true),
        _ => Err("on or off"),
    }
}

/// A secret that goes into a header.
pub fn token(text: Option<&str>, _: &World) -> Parsed<Option<String>> {
    match text {
        Some(text) if !text.bytes().all(|byte| byte.is_ascii_graphic()) => {
            Err("letters, digits and signs without blanks")
        }
        text => Ok(text.map(str::to_owned)),
    }
}

/// Where spans go.
pub fn collector(text: Option<&str>, world: &World) -> Parsed<Option<String>> {
    let is_whole = |url: &String| {
        let uri: Option<http::Uri> = url.parse().ok();
        let authority = uri.as_ref().and_then(http::Uri::authority);
        // A host alone, or with a port that is one.
        authority.is_some_and(|it| it.port_u16().is_some() || it.as_str() == it.host())
    };
    match url(text, world) {
        Ok(found) if found.as_ref().is_none_or(is_whole) => Ok(found),
        _ => Err("a collector such as http://127.0.0.1:4318"),
    }
}

/// Header fields as OpenTelemetry writes them: `name=value` with commas between them, in which
/// `%` and two digits stand for a byte.
pub fn headers(text: Option<&str>, _: &World) -> Parsed<Vec<(String, String)>> {
    const EXPECTED: &str = "header fields such as api-key=secret with commas between them";
    let items = text.unwrap_or_default().split(',').map(str::trim).filter(|item| !item.is_empty());
    let field = |item: &str| {
        let (name, value) = item.split_once('=')?;
        let name: http::HeaderName = name.trim().parse().ok()?;
        let value = crate::routes::percent_decoded(value.trim())?;
        http::HeaderValue::from_str(&value).ok()?;
        Some((name.to_string(), value))
    };
    items.map(|item| field(item).ok_or(EXPECTED)).collect()
}

pub fn url(text: Option<&str>, _: &World) -> Parsed<Option<String>> {
    let Some(text) = text else { return Ok(None) };
    let one = split_urls(text).filter(|urls| urls.len() == 1);
    one.map(|mut urls| urls.pop()).ok_or("a URL such as https://example.org")
}

/// A path, which `~/` or `$V4_HOME/` may begin. One that begins with a home that nobody has is not
/// set.
pub fn path(text: Option<&str>, world: &World) -> Parsed<Option<PathBuf>> {
    let Some(text) = text else { return Ok(None) };
    if let Some(rest) = text.strip_prefix("$V4_HOME/") {
        return Ok(Some(world.home.join(rest)));
    }
    if let Some(rest) = text.strip_prefix("~/") {
        return Ok(world.user.as_ref().map(|user| user.join(rest)));
    }
    if world.is_file && !text.starts_with('/') {
        return Err("a path that begins with /, ~/ or $V4_HOME/");
    }
    std::path::absolute(text).map(Some).map_err(|_| "a path that begins with /")
}

/// A path, or `off`.
pub fn own_path(text: Option<&str>, world: &World) -> Parsed<Option<PathBuf>> {
    if text == Some("off") { Ok(None) } else { path(text, world) }
}

/// URLs with commas between them, or `off` for none.
pub fn urls(text: Option<&str>, _: &World) -> Parsed<Option<Vec<String>>> {
    match text {
        None => Ok(None),
        Some("off") => Ok(Some(Vec::new())),
        Some(value) => split_urls(value)
            .map(Some)
            .ok_or("URLs such as https://registry.ollama.ai with commas between them, or off"),
    }
}

pub fn peers(text: Option<&str>, _: &World) -> Parsed<Vec<String>> {
    let Some(value) = text else { return Ok(Vec::new()) };
    let hosts = split_urls(value);
    let hosts = hosts.filter(|hosts| hosts.iter().all(|url| url.matches('/').count() == 2));
    hosts.ok_or("addresses such as http://10.0.0.2:11434 with commas between them")
}

fn split_urls(value: &str) -> Option<Vec<String>> {
    let urls: Vec<String> =
        value.split(',').map(|url| url.trim().trim_end_matches('/').to_owned()).collect();
    let is_url = |url: &String| {
        let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
        rest.is_some_and(|host| !host.is_empty() && !host.contains(char::is_whitespace))
    };
    urls.iter().all(is_url).then_some(urls)
}

pub fn list(text: Option<&str>, _: &World) -> Parsed<Vec<String>> {
    let items = text.unwrap_or_default().split(',');
    let items = items.map(|item| item.trim().trim_end_matches('/').to_ascii_lowercase());
    let items: Vec<String> = items.filter(|item| !item.is_empty()).collect();
    if items.iter().any(|item| item.contains(char::is_whitespace)) {
        return Err("origins such as https://app.example with commas between them");
    }
    Ok(items)
}

/// Bytes, with K, M, G or T (powers of 1024) behind the number.
pub fn bytes(value: &str) -> Option<u64> {
    let upper = value.to_ascii_uppercase();
    let plain = upper.trim_end_matches("IB").trim_end_matches('B');
    let (digits, shift) = match plain.as_bytes().last() {
        Some(b'K') => (&plain[..plain.len() - 1], 10),
        Some(b'M') => (&plain[..plain.len() - 1], 20),
        Some(b'G') => (&plain[..plain.len() - 1], 30),
        Some(b'T') => (&plain[..plain.len() - 1], 40),
        _ => (plain, 0),
    };
    digits.trim().parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift))
}
