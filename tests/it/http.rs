//! A client that asks for one page at a time.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::{LIMIT, connect};

/// The body of a page.
pub async fn http_get(address: SocketAddr, path: &str) -> String {
    let (head, body) = http(address, path, b"").await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    body
}

/// A page's head and body; `before` goes in front of the request.
pub async fn http(address: SocketAddr, path: &str, before: &[u8]) -> (String, String) {
    let mut stream = connect(address).await;
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(&[before, request.as_bytes()].concat()).await.unwrap();
    let mut answer = Vec::new();
    timeout(LIMIT, stream.read_to_end(&mut answer)).await.expect("an answer within the limit").unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    // The pages are long enough to come in chunks; a chunk's size line has only hexadecimal digits.
    let chunked = head.to_lowercase().contains("transfer-encoding: chunked");
    (head.to_owned(), if chunked { unchunk(body) } else { body.to_owned() })
}

fn unchunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap();
        whole.push_str(&rest[..size]);
        body = rest[size..].trim_start_matches("\r\n");
    }
    whole
}
