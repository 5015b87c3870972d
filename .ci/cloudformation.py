"""What must hold of the templates in deploy/cloudformation, whatever else changes in them.

Each template is worked out as CloudFormation would, with its parameters' defaults and with others; then its resources,
the configuration and the scripts of its user data are checked. Last, templates that break a rule must be found out.
"""

import copy
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from pathlib import Path

from cfnlint.decode import decode

FOLDER = Path("deploy/cloudformation")
PSEUDO = {
    "AWS::AccountId": "111122223333",
    "AWS::NoValue": None,
    "AWS::Partition": "aws",
    "AWS::Region": "us-west-2",
    "AWS::StackName": "lab",
    "AWS::URLSuffix": "amazonaws.com",
}
ADDRESSES = {
    "AcmeBackend1": "10.100.20.10",
    "AcmeBackend2": "10.100.21.10",
    "GlobexBackend1": "10.100.20.11",
    "GlobexBackend2": "10.100.21.11",
}
# The only statements that may name resources with a *, and why.
WILDCARDS = {
    "ReadPackages": "Amazon Linux's own repository, which is many objects",
    "SayThatItIsDrained": "the group's unique ID is not known before the group, the name behind it is",
    "SayThatItIsThere": "the instance's ID is not known before the instance",
    "HoldSessions": "these actions know no resources",
}
SETS = {
    "defaults": {},
    "four ports, all else changed": {
        "ListenerPort": 443,
        "TrafficPort1": 9000,
        "TrafficPort2": "9001",
        "TrafficPort3": "9010",
        "TrafficPort4": "9011",
        "HealthPort": 9100,
        "HealthPath": "/alive",
        "DrainDeadline": 60,
        "ConsumerPrincipals": "arn:aws:iam::444455556666:root,arn:aws:iam::777788889999:root",
    },
}
GIVEN = {
    "PackageBucket": "packages",
    "PackageSha256": "0" * 64,
    "ServiceName": "com.amazonaws.vpce.us-west-2.vpce-svc-0123456789abcdef0",
    "ZoneId1": "usw2-az1",
    "ZoneId2": "usw2-az2",
}


class Stack:
    """A template with its parameters put in: what CloudFormation would make of it."""

    def __init__(self, template, given):
        self.template = template
        self.names = dict(PSEUDO)
        for name, parameter in template["Parameters"].items():
            value = given.get(name, GIVEN.get(name, parameter.get("Default")))
            assert value is not None, f"no value for {name}"
            self.check(name, parameter, value)
            if parameter["Type"] == "CommaDelimitedList":
                value = value.split(",") if value else [""]
            self.names[name] = value
        self.conditions = {
            name: self.work_out(condition) for name, condition in template.get("Conditions", {}).items()
        }
        self.resources = {
            name: resource
            for name, resource in template["Resources"].items()
            if self.conditions.get(resource.get("Condition"), True)
        }
        self.resources = {name: self.work_out(resource) for name, resource in self.resources.items()}

    @staticmethod
    def check(name, parameter, value):
        pattern = parameter.get("AllowedPattern")
        assert pattern is None or re.fullmatch(pattern, str(value)), f"{name}: {value}"
        if parameter["Type"] == "Number":
            assert parameter.get("MinValue", 0) <= value <= parameter.get("MaxValue", value), f"{name}: {value}"

    def work_out(self, value):
        if isinstance(value, list):
            values = (self.work_out(item) for item in value)
            return [item for item in values if item is not None]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            (name, argument), = value.items()
            function = getattr(self, "do_" + name.removeprefix("Fn::").lower(), None)
            if function and (name == "Ref" or name.startswith("Fn::")):
                return function(argument)
            assert not name.startswith("Fn::"), f"unknown: {name}"
        worked_out = {key: self.work_out(item) for key, item in value.items()}
        return {key: item for key, item in worked_out.items() if item is not None}

    def do_ref(self, name):
        return self.names[name] if name in self.names else f"<{name}>"

    def do_getatt(self, argument):
        resource, attribute = argument.split(".", 1) if isinstance(argument, str) else argument
        if attribute == "PrivateIp":
            return ADDRESSES[resource]
        # A security group's reference is its ID in a VPC.
        return f"<{resource}>" if attribute == "GroupId" else f"<{resource}.{attribute}>"

    def do_sub(self, argument):
        text, names = argument if isinstance(argument, list) else (argument, {})
        names = self.work_out(names)

        def put_in(found):
            name = found[1]
            if name.startswith("!"):
                return "${" + name[1:] + "}"
            if name in names:
                return str(names[name])
            return str(self.do_getatt(name) if "." in name else self.do_ref(name))

        return re.sub(r"\$\{([^}]+)\}", put_in, text)

    def do_join(self, argument):
        return argument[0].join(str(item) for item in self.work_out(argument[1]))

    def do_split(self, argument):
        return self.work_out(argument[1]).split(argument[0])

    def do_select(self, argument):
        return self.work_out(argument[1])[int(argument[0])]

    def do_if(self, argument):
        return self.work_out(argument[1] if self.conditions[argument[0]] else argument[2])

    def do_equals(self, argument):
        return self.work_out(argument[0]) == self.work_out(argument[1])

    def do_not(self, argument):
        return not self.work_out(argument[0])

    def do_getazs(self, _region):
        return ["us-west-2a", "us-west-2b"]

    def do_base64(self, text):
        return self.work_out(text)

    def of(self, kind):
        return {
            name: resource.get("Properties", {})
            for name, resource in self.resources.items()
            if resource["Type"] == f"AWS::{kind}"
        }

    def only(self, kind):
        (properties,) = self.of(kind).values()
        return properties


def files_of(script):
    """The files that a script writes: path and text."""
    found = re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", script, re.M | re.S)
    return {path: text for path, text in found}


def user_data(stack):
    return stack.of("EC2::LaunchTemplate")["ProxyTemplate"]["LaunchTemplateData"]["UserData"]


def ingress(stack, group):
    """Every rule that lets somebody into a group."""
    rules = list(stack.of("EC2::SecurityGroup")[group].get("SecurityGroupIngress", []))
    apart = stack.of("EC2::SecurityGroupIngress").values()
    return rules + [rule for rule in apart if rule["GroupId"] == f"<{group}>"]


# ------------------------------------------------------------------------------------------- rules for both templates


def nobody_comes_in_by_address(stack):
    for group in stack.of("EC2::SecurityGroup"):
        for rule in ingress(stack, group):
            if "SourceSecurityGroupId" not in rule:
                yield f"{group}: lets in addresses, and not a security group: {rule}"


def there_is_no_way_to_the_internet(stack):
    for name, resource in stack.resources.items():
        kind = resource["Type"].removeprefix("AWS::EC2::")
        if kind in ("InternetGateway", "NatGateway", "EIP", "EgressOnlyInternetGateway"):
            yield f"{name}: is a way to the internet"
        text = str(resource)
        if "AssociatePublicIpAddress" in text or "MapPublicIpOnLaunch" in text or "KeyName" in text:
            yield f"{name}: has a public address, or a key to log in with"


def permissions_are_narrow(stack):
    def statements(value):
        if isinstance(value, dict):
            if "Effect" in value:
                yield value
            for item in value.values():
                yield from statements(item)
        elif isinstance(value, list):
            for item in value:
                yield from statements(item)

    for name, resource in stack.resources.items():
        if "ManagedPolicyArns" in resource.get("Properties", {}):
            yield f"{name}: has a policy that is not written here"
        for statement in statements(resource.get("Properties", {})):
            sid = statement.get("Sid", "no Sid")
            lists = {key: statement.get(key, []) for key in ("Action", "Resource")}
            lists = {key: [item] if isinstance(item, str) else item for key, item in lists.items()}
            if "NotAction" in statement or "NotResource" in statement:
                yield f"{name}: {sid}: allows what it does not name"
            if any("*" in action for action in lists["Action"]):
                yield f"{name}: {sid}: wildcard action"
            if any("*" in item for item in lists["Resource"]) and sid not in WILDCARDS:
                yield f"{name}: {sid}: wildcard resource"


def instances_are_guarded(stack):
    templates = stack.of("EC2::LaunchTemplate")
    for name, properties in templates.items():
        launch = properties["LaunchTemplateData"]
        options = launch.get("MetadataOptions", {})
        if options.get("HttpTokens") != "required" or options.get("HttpPutResponseHopLimit") != 1:
            yield f"{name}: takes IMDSv1, or from further away than the instance"
        volumes = launch.get("BlockDeviceMappings", [])
        if not volumes or not all(volume["Ebs"].get("Encrypted") for volume in volumes):
            yield f"{name}: a volume is not encrypted"
    users = stack.of("EC2::Instance") | stack.of("AutoScaling::AutoScalingGroup")
    for name, properties in users.items():
        reference = properties.get("LaunchTemplate", {}).get("LaunchTemplateId", "")
        if reference.strip("<>") not in templates:
            yield f"{name}: is not made from a launch template"


# -------------------------------------------------------------------------------------------- rules for the provider


def config_of(stack):
    return tomllib.loads(files_of(user_data(stack))["/etc/vestibule/vestibule.toml"])


def port(address):
    return int(address.rpartition(":")[2])


def the_load_balancer_fits_the_configuration(stack):
    config = config_of(stack)
    groups = stack.of("ElasticLoadBalancingV2::TargetGroup")
    for name, group in groups.items():
        attributes = {item["Key"]: str(item["Value"]) for item in group["TargetGroupAttributes"]}
        if attributes.get("proxy_protocol_v2.enabled") != "true":
            yield f"{name}: PROXY v2 is off"
        if attributes.get("preserve_client_ip.enabled") != "false":
            yield f"{name}: the peer is not the load balancer"
        for kind in ("deregistration_delay", "target_health_state.unhealthy"):
            if attributes.get(f"{kind}.connection_termination.enabled") != "false":
                yield f"{name}: {kind}: ends connections, also of a proxy that drains"
        if group["Protocol"] != "TCP" or group["HealthCheckProtocol"] != "HTTP":
            yield f"{name}: is not TCP with checks by HTTP"
        if group["HealthCheckPort"] != port(config["health"]["bind"]):
            yield f"{name}: the health port is not the configuration's"
        if group["HealthCheckPath"] != config["health"]["path"]:
            yield f"{name}: the health path is not the configuration's"
    ports = [port(bind) for bind in config["listener"][0]["bind"]]
    if sorted(ports) != sorted(int(group["Port"]) for group in groups.values()):
        yield f"the listener's ports {ports} are not those of the target groups"
    references = {f"<{name}>" for name in groups}
    (action,) = stack.only("ElasticLoadBalancingV2::Listener")["DefaultActions"]
    forwards = action["ForwardConfig"]["TargetGroups"]
    if {item["TargetGroupArn"] for item in forwards} != references or {item["Weight"] for item in forwards} != {1}:
        yield "the load balancer's listener does not forward to all target groups alike"
    if set(stack.only("AutoScaling::AutoScalingGroup")["TargetGroupARNs"]) != references:
        yield "the Auto Scaling group is not in all target groups"
    balancer = stack.only("ElasticLoadBalancingV2::LoadBalancer")
    if balancer["Scheme"] != "internal" or balancer["Type"] != "network":
        yield "the load balancer is not internal"
    subnets = {f"<{name}>": subnet["CidrBlock"] for name, subnet in stack.of("EC2::Subnet").items()}
    if {subnets[name] for name in balancer["Subnets"]} != set(config["listener"][0]["trusted-sources"]):
        yield "trusted-sources are not the load balancer's subnets"


def only_the_load_balancer_reaches_the_proxies(stack):
    config = config_of(stack)
    ports = {port(bind) for bind in config["listener"][0]["bind"]} | {port(config["health"]["bind"])}
    rules = ingress(stack, "ProxySecurityGroup")
    for rule in rules:
        if rule.get("SourceSecurityGroupId") != "<LoadBalancerSecurityGroup>":
            yield f"the proxies let in others than the load balancer: {rule}"
        if rule["FromPort"] != rule["ToPort"] or int(rule["FromPort"]) not in ports or rule["IpProtocol"] != "tcp":
            yield f"the proxies let in more than traffic and health checks: {rule}"
    if {int(rule["FromPort"]) for rule in rules} != ports:
        yield "a port of the proxies is closed"
    if ingress(stack, "LoadBalancerSecurityGroup"):
        yield "the load balancer lets in more than PrivateLink"


def consumers_are_let_in_one_by_one(stack):
    if stack.only("EC2::VPCEndpointService").get("AcceptanceRequired") is not True:
        yield "consumers come in without acceptance"
    if any("*" in principal for principal in stack.only("EC2::VPCEndpointServicePermissions")["AllowedPrincipals"]):
        yield "everybody may ask to come in"


def scale_in_drains(stack):
    group = stack.only("AutoScaling::AutoScalingGroup")
    hooks = group.get("LifecycleHookSpecificationList", [])
    hooks = [hook for hook in hooks if hook["LifecycleTransition"] == "autoscaling:EC2_INSTANCE_TERMINATING"]
    if len(hooks) != 1:
        yield "nothing waits for the drain"
        return
    deadline = int(config_of(stack)["drain"]["deadline"].removesuffix("s"))
    if hooks[0]["HeartbeatTimeout"] <= deadline + 60:
        yield "an instance ends before its drain"
    script = files_of(user_data(stack))["/usr/local/sbin/vestibule-lifecycle"]
    for option, value in (
        ("auto-scaling-group-name", group["AutoScalingGroupName"]),
        ("lifecycle-hook-name", hooks[0]["LifecycleHookName"]),
    ):
        if not re.search(rf"--{option} '?{re.escape(value)}'?\s", script):
            yield f"vestibule-lifecycle has another {option}"
    if f"autoScalingGroupName/{group['AutoScalingGroupName']}'" not in str(stack.only("IAM::Role")):
        yield "the proxies may not say that they are drained"
    unit = Path("deploy/systemd/vestibule.service").read_text()
    found = re.search(r"^TimeoutStopSec=(\d+)(s|min)?$", unit, re.M)
    if not found or int(found[1]) * (60 if found[2] == "min" else 1) <= deadline:
        yield "systemd does not wait for the drain"


BOTH = [
    nobody_comes_in_by_address,
    there_is_no_way_to_the_internet,
    permissions_are_narrow,
    instances_are_guarded,
]
PROVIDER = [
    the_load_balancer_fits_the_configuration,
    only_the_load_balancer_reaches_the_proxies,
    consumers_are_let_in_one_by_one,
    scale_in_drains,
]


def faults_of(provider, consumer, given):
    stacks = {"provider": Stack(provider, given), "consumer": Stack(consumer, given)}
    for name, stack in stacks.items():
        for rule in BOTH + (PROVIDER if name == "provider" else []):
            yield from (f"{name}: {fault}" for fault in rule(stack))
    blocks = {name: stack.only("EC2::VPC")["CidrBlock"] for name, stack in stacks.items()}
    if len(set(blocks.values())) != 1:
        yield f"the VPCs' addresses differ, so that nothing is shown: {blocks}"


# ------------------------------------------------------------------------------------------------ that the rules bite


def properties(template, name):
    return template["Resources"][name]["Properties"]


def put(template, resource, path, value):
    """Changes one thing of a resource."""
    place = properties(template, resource)
    *folders, last = path
    for step in folders:
        place = place[step]
    place[last] = value


def attribute(template, key, value):
    for item in properties(template, "TargetGroup1")["TargetGroupAttributes"]:
        if item["Key"] == key:
            item["Value"] = value


LAUNCH = ["LaunchTemplateData"]
STATEMENT = ["Policies", 0, "PolicyDocument", "Statement", 0]
OPEN = {"IpProtocol": "tcp", "FromPort": 8080, "ToPort": 8080, "CidrIp": "0.0.0.0/0"}
OPEN_6 = {"IpProtocol": "tcp", "FromPort": 8080, "ToPort": 8080, "CidrIpv6": "::/0"}
BREAKS = [
    ("PROXY v2 is off", lambda p, c: attribute(p, "proxy_protocol_v2.enabled", "false")),
    ("the peer is not", lambda p, c: attribute(p, "preserve_client_ip.enabled", "true")),
    (
        "deregistration_delay: ends",
        lambda p, c: attribute(p, "deregistration_delay.connection_termination.enabled", "true"),
    ),
    (
        "unhealthy: ends",
        lambda p, c: attribute(p, "target_health_state.unhealthy.connection_termination.enabled", "true"),
    ),
    ("the health port is not", lambda p, c: put(p, "TargetGroup1", ["HealthCheckPort"], 8080)),
    ("the health path is not", lambda p, c: put(p, "TargetGroup1", ["HealthCheckPath"], "/")),
    ("are not those of the target groups", lambda p, c: put(p, "TargetGroup1", ["Port"], 8088)),
    ("not in all target groups", lambda p, c: put(p, "ProxyGroup", ["TargetGroupARNs"], [])),
    ("trusted-sources are not", lambda p, c: put(p, "LoadBalancerSubnet1", ["CidrBlock"], "10.100.2.0/24")),
    ("is not internal", lambda p, c: put(p, "LoadBalancer", ["Scheme"], "internet-facing")),
    ("lets in addresses", lambda p, c: put(p, "ProxySecurityGroup", ["SecurityGroupIngress"], [OPEN])),
    ("lets in addresses", lambda p, c: put(c, "EndpointSecurityGroup", ["SecurityGroupIngress"], [OPEN_6])),
    (
        "others than the load balancer",
        lambda p, c: put(p, "TrafficIngress1", ["SourceSecurityGroupId"], {"Ref": "BackendSecurityGroup"}),
    ),
    ("more than traffic", lambda p, c: put(p, "HealthIngress", ["FromPort"], 1)),
    ("more than PrivateLink", lambda p, c: put(p, "HealthIngress", ["GroupId"], "<LoadBalancerSecurityGroup>")),
    ("without acceptance", lambda p, c: put(p, "EndpointService", ["AcceptanceRequired"], False)),
    ("everybody may ask", lambda p, c: put(p, "EndpointServicePermissions", ["AllowedPrincipals"], ["*"])),
    ("wildcard action", lambda p, c: put(p, "ProxyRole", [*STATEMENT, "Action"], "s3:*")),
    ("wildcard resource", lambda p, c: put(p, "ProxyRole", [*STATEMENT, "Resource"], "*")),
    ("not written here", lambda p, c: put(c, "InstanceRole", ["ManagedPolicyArns"], ["arn:aws:iam::aws:policy/x"])),
    ("takes IMDSv1", lambda p, c: put(p, "ProxyTemplate", [*LAUNCH, "MetadataOptions", "HttpTokens"], "optional")),
    ("is not encrypted", lambda p, c: put(c, "InstanceTemplate", [*LAUNCH, "BlockDeviceMappings"], [])),
    ("not made from a launch", lambda p, c: put(c, "Instance", ["LaunchTemplate"], {})),
    ("public address", lambda p, c: put(c, "Subnet1", ["MapPublicIpOnLaunch"], True)),
    ("way to the internet", lambda p, c: p["Resources"].update(Out={"Type": "AWS::EC2::InternetGateway"})),
    ("addresses differ", lambda p, c: put(c, "Vpc", ["CidrBlock"], "10.101.0.0/16")),
    ("nothing waits", lambda p, c: put(p, "ProxyGroup", ["LifecycleHookSpecificationList"], [])),
    ("another auto-scaling-group-name", lambda p, c: put(p, "ProxyGroup", ["AutoScalingGroupName"], "other")),
    ("ends before its drain", lambda p, c: p["Parameters"]["HookTimeout"].update(Default=400, MinValue=60) or put(
        p, "ProxyGroup", ["LifecycleHookSpecificationList", 0, "HeartbeatTimeout"], 300)),
]


def rules_bite(provider, consumer):
    for expected, change in BREAKS:
        changed = copy.deepcopy(provider), copy.deepcopy(consumer)
        change(*changed)
        faults = list(faults_of(*changed, {}))
        if not any(expected in fault for fault in faults):
            yield f"a template that deserves it is not told: {expected} (but: {faults})"


# ---------------------------------------------------------------------------------------------------------- user data


def run(arguments, **more):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False, **more)


def scripts_are_sound(stack, folder):
    """Every script, also those that scripts write, before shellcheck."""
    launches = stack.of("EC2::LaunchTemplate") | stack.of("EC2::Instance")
    for name, item in launches.items():
        text = item.get("UserData") or item.get("LaunchTemplateData", {}).get("UserData")
        for at, script in {name: text or "", **files_of(text or "")}.items():
            if script.startswith("#!"):
                path = folder / (name + at.replace("/", "-"))
                path.write_text(script)
                checked = run(["shellcheck", "--shell=bash", path])
                if checked.returncode:
                    yield checked.stdout


def the_configuration_is_fine(stack, folder, vestibule):
    path = folder / "vestibule.toml"
    path.write_text(files_of(user_data(stack))["/etc/vestibule/vestibule.toml"])
    (folder / "tenants.d").mkdir(exist_ok=True)
    (folder / "tenants.d/tenants.toml").write_text(stack.only("SSM::Parameter")["Value"])
    checked = run([vestibule, "check", "--config", path])
    print(checked.stdout.strip().removeprefix(f"{folder}/"))
    if checked.returncode:
        yield checked.stderr


class Stage:
    """Commands that only write down that they were called, for a script to run among."""

    def __init__(self, folder, vestibule, **commands):
        self.log = folder / "log"
        for name, body in commands.items():
            self.command(folder / name, f'echo "{name} $*" >> {self.log}\n{body}')
        (folder / "vestibule").symlink_to(Path(vestibule).resolve())
        self.environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "STAGE": str(folder)}

    @staticmethod
    def command(path, body):
        path.write_text("#!/bin/bash\n" + textwrap.dedent(body))
        path.chmod(0o755)

    def run(self, script):
        self.log.write_text("")
        ran = run(["bash", "-c", script], env=self.environment)
        return ran, self.log.read_text().splitlines()


def scale_in_really_drains(stack, folder, vestibule):
    script = files_of(user_data(stack))["/usr/local/sbin/vestibule-lifecycle"]
    stage = Stage(
        folder,
        vestibule,
        sleep="",
        aws="",
        systemctl="exit 1",
        # Not there, not there yet, in service, and at the fourth question to be ended.
        curl="""\
        case "$*" in
          *api/token*) echo token ;;
          *instance-id*) echo i-0123456789abcdef0 ;;
          *target-lifecycle-state*)
            echo >> "$STAGE/asked"
            case $(wc -l < "$STAGE/asked") in
              1) exit 7 ;;
              2) exit 22 ;;
              3) echo InService ;;
              4) echo Terminated ;;
            esac ;;
        esac
        """,
    )
    ran, log = stage.run(script)
    calls = [line.split()[0] for line in log if not line.startswith("curl")]
    if ran.returncode or calls != ["sleep"] * 3 + ["systemctl", "aws"]:
        yield f"vestibule-lifecycle: {ran.stderr} {log}"
    elif "systemctl stop vestibule" not in log or "i-0123456789abcdef0" not in log[-1]:
        yield f"vestibule-lifecycle: {log}"


def tenants_are_really_reloaded(stack, folder, vestibule):
    texts = files_of(user_data(stack))
    etc = folder / "etc"
    (etc / "tenants.d").mkdir(parents=True)
    (etc / "vestibule.toml").write_text(texts["/etc/vestibule/vestibule.toml"])
    script = texts["/usr/local/sbin/vestibule-tenants"].replace("/etc/vestibule", str(etc))
    stage = Stage(folder, vestibule, systemctl="", aws='cat "$STAGE/tenants"')
    good = stack.only("SSM::Parameter")["Value"]
    better = good.replace("endpoints = []", 'endpoints = ["vpce-08d2bf15fac5001c9"]', 1)
    for text, reloads, is_fine in (
        (good, 1, True),
        (good, 0, True),
        (good.replace('"acme"', '"nobody"'), 0, False),
        (better, 1, True),
    ):
        before = [path.read_text() for path in (etc / "tenants.d").iterdir()]
        (folder / "tenants").write_text(text)
        ran, log = stage.run(script)
        after = [path.read_text() for path in (etc / "tenants.d").iterdir()]
        if (ran.returncode == 0) != is_fine or log.count("systemctl reload vestibule") != reloads:
            yield f"vestibule-tenants: {ran} {log}"
        if after != ([text] if is_fine else before):
            yield f"vestibule-tenants: left {after}"


def main(vestibule):
    provider, consumer = (decode(str(FOLDER / f"{name}.yaml"))[0] for name in ("provider", "consumer"))
    faults = []
    for name, given in SETS.items():
        print(f"with {name}:", end=" ", flush=True)
        faults += [f"with {name}: {fault}" for fault in faults_of(provider, consumer, given)]
        for stack in (Stack(provider, given), Stack(consumer, given)):
            with tempfile.TemporaryDirectory() as folder:
                faults += scripts_are_sound(stack, Path(folder))
        stack = Stack(provider, given)
        for test in (the_configuration_is_fine, scale_in_really_drains, tenants_are_really_reloaded):
            with tempfile.TemporaryDirectory() as folder:
                faults += test(stack, Path(folder), vestibule)
    faults += rules_bite(provider, consumer)
    for fault in faults:
        print(f"fault: {fault}", file=sys.stderr)
    print(f"{len(BOTH + PROVIDER)} rules hold, and {len(BREAKS)} templates that break one are found out" * (not faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
