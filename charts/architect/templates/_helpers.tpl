{{/*
Names that the contract fixes: they do not depend on the release's name, so one cluster has one
release of this chart; helm refuses a second, because the cluster-wide objects are there already.
*/}}
{{- define "architect.prefix" -}}architect.loopholelabs.io{{- end }}

{{/* Where everything of ours is, in the image and on a node. */}}
{{- define "architect.bin" -}}/usr/local/lib/architect/venv/bin{{- end }}

{{- define "architect.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* The labels by which a component's pods are found; they may never change. Takes the name. */}}
{{- define "architect.selector" -}}
app: {{ . }}
{{- end }}

{{/*
Labels of a component's pods. No version of chart or program: an upgrade that changes nothing else
restarts nothing. Takes a list: the root, the component's name.
*/}}
{{- define "architect.podLabels" -}}
{{- $root := index . 0 }}
{{- $name := index . 1 -}}
{{ include "architect.selector" $name }}
app.kubernetes.io/name: {{ $name }}
app.kubernetes.io/component: {{ $name }}
app.kubernetes.io/part-of: architect
app.kubernetes.io/instance: {{ $root.Release.Name }}
{{- end }}

{{/* Labels of every object of a component. Takes a list: the root, the component's name. */}}
{{- define "architect.labels" -}}
{{- $root := index . 0 -}}
{{ include "architect.podLabels" . }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Labels of the user's and ours; label values are strings, whatever --set made of them. */}}
{{- define "architect.nodeSelector" -}}
{{- $ours := index . 0 }}
{{- $theirs := index . 1 }}
{{- printf "%s: %q" $ours "true" }}
{{- range $key, $value := $theirs }}
{{ $key | quote }}: {{ $value | toString | quote }}
{{- end }}
{{- end }}

{{/* Tolerations of the user's: `--set` makes numbers and truth values of strings. */}}
{{- define "architect.tolerations" -}}
{{- range . }}
{{- $one := dict }}
{{- range $key, $value := . }}
{{- if eq $key "tolerationSeconds" }}
{{- $_ := set $one $key (int64 $value) }}
{{- else }}
{{- $_ := set $one $key (toString $value) }}
{{- end }}
{{- end }}
{{ list $one | toYaml }}
{{- end }}
{{- end }}

{{/* What a component without any right on its node may do: nothing. */}}
{{- define "architect.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "architect.restrictedPod" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* Who the pod is, as environment. */}}
{{- define "architect.whoami" -}}
- name: NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: POD_NAMESPACE
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
{{- end }}

{{/* The contract's least idle time is a second; the schema cannot add up a duration. */}}
{{- define "architect.scaledown" -}}
{{- $given := .Values.defaultScaledownDuration }}
{{- if lt (mustDateModify $given (toDate "2006" "2006") | unixEpoch | int64) (toDate "2006" "2006" | unixEpoch | int64 | add 1) }}
{{- fail (printf "defaultScaledownDuration: %s is less than a second; give 1s or more" $given) }}
{{- end }}
{{- $given }}
{{- end }}

{{/* Pods of one component rather on different nodes. Takes the component's name. */}}
{{- define "architect.apart" -}}
podAntiAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "architect.selector" . | nindent 12 }}
{{- end }}
