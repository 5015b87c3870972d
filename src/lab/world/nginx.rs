//! The backends' nginx: each answers with its name, the proxy and the client address that it sees.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// What a long download is called, in the folder that all backends share.
pub(crate) const DOWNLOAD: &str = "download";
/// How long it is: half a dozen seconds at nginx's limit.
pub(crate) const LEN: usize = 1024 * 1024;
/// How fast a backend sends it.
const RATE: &str = "160k";

/// Writes the file that takes long.
pub(super) fn write_download(folder: &Path) -> io::Result<()> {
    fs::write(folder.join(DOWNLOAD), vec![b'.'; LEN])
}

/// Writes a backend's configuration into a folder of its own; which file it is.
pub(super) fn write(folder: &Path, root: &Path, name: &str, address: SocketAddr) -> io::Result<PathBuf> {
    fs::create_dir_all(folder)?;
    let file = folder.join("nginx.conf");
    let temp = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {kind};"))
        .join("\n    ");
    let root = root.display();
    let text = format!(
        r#"daemon off;
master_process off;
pid pid;
error_log stderr warn;
events {{}}
http {{
    access_log off;
    {temp}
    server {{
        listen {address} proxy_protocol backlog=4096;
        location = /{DOWNLOAD} {{
            root {root};
            limit_rate {RATE};
            add_header X-Proxy $remote_addr;
        }}
        location / {{
            default_type application/json;
            return 200 '{{"backend":"{name}","client":"$proxy_protocol_addr:$proxy_protocol_port","proxy":"$remote_addr"}}\n';
        }}
    }}
}}
"#
    );
    fs::write(&file, text)?;
    Ok(file)
}
