//! `/`: the status page in HTML, without scripts.

use std::fmt::Write;
use std::time::Duration;

use super::status::Status;

const HEAD: &str = r#"<!doctype html><html lang="en"><head><meta charset="utf-8"><title>vestibule</title>
<meta http-equiv="refresh" content="2"><meta name="viewport" content="width=device-width">
<style>
:root{color-scheme:light dark;--line:#8884;--good:#2a7d46;--bad:#b3372e;--dim:#888}
body{font:15px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .4rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:600;color:var(--dim);font-size:.85rem}
td,th{padding:.25rem .8rem .25rem 0;border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right}.good{color:var(--good)}.bad{color:var(--bad)}.dim{color:var(--dim)}
</style></head><body>
"#;

/// The page.
pub(super) fn html(status: &Status) -> String {
    let mut page = HEAD.to_owned();
    let ready = match status.not_ready {
        None => "<span class=\"good\">ready</span>".to_owned(),
        Some(reason) => {
            let drain = status.drain.as_ref().map(|drain| {
                format!(", {} left, {} s to the deadline", drain.sessions_left, drain.seconds_to_deadline)
            });
            format!("<span class=\"bad\">not ready: {reason}{}</span>", drain.unwrap_or_default())
        }
    };
    push(
        &mut page,
        format_args!(
            "<h1>vestibule {}</h1><p>{ready} &middot; {} of {} sessions &middot; {} tenants &middot; sessions by worker: {} \
             &middot; <a href=\"/status\">JSON</a> &middot; <a href=\"/metrics\">metrics</a></p>",
            status.version,
            status.sessions,
            status.sessions_limit,
            status.tenants_known,
            status.workers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        ),
    );
    listeners(&mut page, status);
    pools(&mut page, status);
    backends(&mut page, status);
    tenants(&mut page, status);
    unidentified(&mut page, status);
    page.push_str("</body></html>\n");
    page
}

fn listeners(page: &mut String, status: &Status) {
    open(page, "Listeners", &["name", "addresses"], &["accepted", "pending"]);
    for listener in &status.listeners {
        let addresses: Vec<_> = listener.addresses.iter().map(ToString::to_string).collect();
        row(page, &[&listener.name, &addresses.join(", ")], &[listener.accepted, listener.pending]);
    }
    page.push_str("</table>");
}

fn pools(page: &mut String, status: &Status) {
    open(page, "Pools", &["pool", "serving from"], &["usable", "queued", "retries", "retries refused"]);
    for pool in &status.pools {
        let waiting = [pool.usable as u64, pool.queued as u64];
        row(
            page,
            &[&pool.name, pool.ground],
            &[&waiting[..], &[pool.retries, pool.retries_refused]].concat(),
        );
    }
    page.push_str("</table>");
}

fn backends(page: &mut String, status: &Status) {
    let texts = ["pool", "backend", "zone", "state", "since", "last change", "weight"];
    open(page, "Backends", &texts, &["sessions", "ejections", "probes passed", "probes failed"]);
    for pool in &status.pools {
        for backend in &pool.backends {
            let since = Duration::from_secs(backend.changed_seconds_ago);
            let since = humantime::format_duration(since).to_string();
            let zone = backend.zone.as_deref().unwrap_or("-");
            let weight = if (backend.weight_in_force - f64::from(backend.weight)).abs() < 0.01 {
                backend.weight.to_string()
            } else {
                format!("{:.1} of {}", backend.weight_in_force, backend.weight)
            };
            let texts = [&pool.name, &backend.address, zone, backend.state, &since, backend.why, &weight];
            let probes = [backend.probes_done, backend.probes_failed];
            let sessions = u64::from(backend.sessions);
            row(page, &texts, &[&[sessions, backend.ejections], &probes[..]].concat());
        }
    }
    page.push_str("</table>");
}

fn tenants(page: &mut String, status: &Status) {
    let numbers = ["sessions", "ended", "ended by proxy", "rejected", "bytes to backend", "bytes to client"];
    open(page, "Tenants with traffic", &["tenant", "session limit"], &numbers);
    for tenant in &status.tenants {
        let limit = tenant.sessions_limit.map_or_else(|| "-".to_owned(), |limit| limit.to_string());
        let ended = [tenant.sessions, tenant.ended, tenant.ended_by_proxy, tenant.rejected];
        row(page, &[&tenant.name, &limit], &[&ended[..], &[tenant.to_backend, tenant.to_client]].concat());
    }
    page.push_str("</table>");
}

fn unidentified(page: &mut String, status: &Status) {
    open(page, "Ended before the tenant was known", &["reason"], &["connections"]);
    for (why, count) in &status.unidentified {
        row(page, &[why], &[*count]);
    }
    page.push_str("</table>");
}

fn open(page: &mut String, title: &str, texts: &[&str], numbers: &[&str]) {
    push(page, format_args!("<h2>{title}</h2><table><tr>"));
    for text in texts {
        push(page, format_args!("<th>{text}</th>"));
    }
    for number in numbers {
        push(page, format_args!("<th class=\"n\">{number}</th>"));
    }
    page.push_str("</tr>\n");
}

fn row(page: &mut String, texts: &[&str], numbers: &[u64]) {
    page.push_str("<tr>");
    for text in texts {
        let class = match *text {
            "healthy" => " class=\"good\"",
            "unhealthy" | "ejected" | "panic" | "none" => " class=\"bad\"",
            "unknown" => " class=\"dim\"",
            _ => "",
        };
        push(page, format_args!("<td{class}>{}</td>", Escaped(text)));
    }
    for number in numbers {
        push(page, format_args!("<td class=\"n\">{number}</td>"));
    }
    page.push_str("</tr>\n");
}

fn push(page: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    page.write_fmt(text).unwrap_or_default();
}

/// Text of the operator's inside HTML. Names have no such characters by the checks; a page does not rely on that.
struct Escaped<'a>(&'a str);

impl std::fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for character in self.0.chars() {
            match character {
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '&' => f.write_str("&amp;")?,
                '"' => f.write_str("&quot;")?,
                _ => f.write_char(character)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_in_a_name_stays_text() {
        assert_eq!(Escaped("<a & \"b\">").to_string(), "&lt;a &amp; &quot;b&quot;&gt;");
    }
}
