"""What no schema knows of deploy/container: the manifests agree with each other and with the configuration in them.

Usage: container-policy.py VESTIBULE FOLDER. Exit status 1 and a line for each fault, 0 where there is none.
"""

import ipaddress
import pathlib
import subprocess
import sys
import tempfile
import tomllib

import yaml

PREFIX = "service.beta.kubernetes.io/aws-load-balancer-"

# What the load balancer has to be told, so that it neither hides the endpoint nor resets what is draining.
ANNOTATIONS = {
    "type": "external",
    "nlb-target-type": "ip",
    "scheme": "internal",
    "proxy-protocol": "*",
    "healthcheck-protocol": "http",
    "inbound-sg-rules-on-private-link-traffic": "off",
}
ATTRIBUTES = {
    "proxy_protocol_v2.enabled": "true",
    "preserve_client_ip.enabled": "false",
    "deregistration_delay.connection_termination.enabled": "false",
    "target_health_state.unhealthy.connection_termination.enabled": "false",
}

faults = []


def must(holds, text):
    if not holds:
        faults.append(text)


def seconds(text):
    return int(text.removesuffix("s"))


def port(address):
    return int(address.rsplit(":", 1)[1])


def main(program, folder):
    documents = {}
    for path in sorted(folder.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            documents[document["kind"]] = document
    listed = set(documents["Kustomization"]["resources"])
    must(listed == {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}, "kustomization.yaml lists all files")

    text = documents["ConfigMap"]["data"]["vestibule.toml"]
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text)
        file.flush()
        checked = subprocess.run([program, "check", "--config", file.name], capture_output=True, text=True)
    print(checked.stdout, end="")
    must(checked.returncode == 0, f"the ConfigMap's configuration: {checked.stderr}")
    config = tomllib.loads(text)

    pod = documents["Deployment"]["spec"]["template"]["spec"]
    labels = documents["Deployment"]["spec"]["template"]["metadata"]["labels"]
    (container,) = pod["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    listeners = {port(each["bind"]) for each in config["listener"]}
    health, admin = port(config["health"]["bind"]), port(config["admin"]["bind"])
    must(set(ports.values()) == listeners | {health, admin}, "the container's ports are those of the configuration")
    must(config["process"]["workers"] == int(container["resources"]["requests"]["cpu"]), "workers are as the requested cpu")
    grace = pod["terminationGracePeriodSeconds"]
    must(grace >= seconds(config["drain"]["deadline"]) + 10, "the grace period is longer than [drain] deadline")
    must("lifecycle" not in container, "nothing delays the 503 of a drain")
    probe = container["readinessProbe"]["httpGet"]
    path = config["health"].get("path", "/healthz")
    must((probe["path"], ports[probe["port"]]) == (path, health), "readiness asks what [health] answers")
    must(":" in container["image"] and not container["image"].endswith(":latest"), "the image has a version")

    own, shared = container["securityContext"], pod["securityContext"]
    must(shared["runAsNonRoot"] and shared["runAsUser"] > 0, "not root")
    must(shared["seccompProfile"]["type"] == "RuntimeDefault", "seccomp")
    must(own["capabilities"] == {"drop": ["ALL"]} and own["allowPrivilegeEscalation"] is False, "no privileges")
    must(own["readOnlyRootFilesystem"] is True and pod["automountServiceAccountToken"] is False, "nothing to write, no token")
    must(documents["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted", "restricted")

    service = documents["Service"]
    said = service["metadata"]["annotations"]
    for name, value in ANNOTATIONS.items():
        must(said.get(PREFIX + name) == value, f"{name} is {value}")
    must(int(said[PREFIX + "healthcheck-port"]) == health, "the load balancer asks the health port")
    must(said[PREFIX + "healthcheck-path"] == path, "the load balancer asks the health path")
    attributes = dict(each.split("=") for each in said[PREFIX + "target-group-attributes"].split(","))
    for name, value in ATTRIBUTES.items():
        must(attributes.get(name) == value, f"{name} is {value}")
    deadline = seconds(config["drain"]["deadline"])
    for name in ("deregistration_delay.timeout_seconds", "target_health_state.unhealthy.draining_interval_seconds"):
        must(int(attributes[name]) >= deadline, f"{name} is not less than [drain] deadline")
    must({each["targetPort"] for each in service["spec"]["ports"]} <= listeners, "the Service leads to listeners")

    selectors = {
        "Service": service["spec"]["selector"],
        "Deployment": documents["Deployment"]["spec"]["selector"]["matchLabels"],
        "PodDisruptionBudget": documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        "NetworkPolicy": documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    }
    for kind, selector in selectors.items():
        must(selector.items() <= labels.items(), f"{kind} selects the pods")
    space = documents["Namespace"]["metadata"]["name"]
    for kind in {*selectors, "ConfigMap"}:
        must(documents[kind]["metadata"]["namespace"] == space, f"{kind} is in the namespace")

    trusted = {source for each in config["listener"] for source in each["trusted-sources"]}
    for rule in documents["NetworkPolicy"]["spec"]["ingress"]:
        open_to = {each["port"] for each in rule["ports"]}
        blocks = {source["ipBlock"]["cidr"] for source in rule["from"] if "ipBlock" in source}
        must(not open_to & listeners or blocks == trusted, "who reaches a listener is who is trusted")
        must(all(ipaddress.ip_network(block).prefixlen > 0 for block in blocks), "open to nobody else")
        must(bool(rule["from"]), "a rule says from whom")


main(sys.argv[1], pathlib.Path(sys.argv[2]))
for fault in faults:
    print(f"deploy/container: must hold: {fault}", file=sys.stderr)
sys.exit(1 if faults else 0)
